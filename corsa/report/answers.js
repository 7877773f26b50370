// The table of all answers: search, filters and pages over columns that hold each text once.
(() => {
  const PAGE = matchMedia("(max-width: 40rem)").matches ? 10 : 25;
  const WORDS = {
    took: "took", failed: "neither answer", reverted: "old answer", changed: "changed", unchanged: "same as before",
  };
  const form = document.getElementById("answers-filters");
  const table = document.getElementById("answers-table");
  const body = table.tBodies[0];
  const count = document.getElementById("answers-count");
  const pages = document.querySelector("#answers .pages");
  const [before, after] = pages.querySelectorAll("button");

  const element = (name, text, properties) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return Object.assign(made, properties);
  };

  const start = (answers) => {
    const { columns, rows } = answers;
    const at = (name, row) => columns[name].values[columns[name].codes[row]];
    const searched = ["question", "expected", "old", "output"];
    const lower = searched.map((name) => columns[name].values.map((text) => text.toLowerCase()));
    const selects = [...form.querySelectorAll("select")];
    let found = [];
    let page = 0;

    for (const select of selects) {
      const values = columns[select.name].values.map((value, code) => [value, code]);
      if (typeof values[0]?.[0] === "number") values.sort((a, b) => a[0] - b[0]);
      select.append(element("option", "all", { value: "" }));
      for (const [value, code] of values) select.append(element("option", value, { value: code }));
      select.parentElement.hidden = values.length < 2;
    }

    // Rows that pass the search and the selects; counted by outcome, then narrowed to the chosen one.
    const filter = () => {
      const words = form.search.value.trim().toLowerCase();
      const hits = words ? lower.map((texts) => texts.map((text) => text.includes(words))) : null;
      const chosen = selects.filter((select) => select.value).map((select) => [columns[select.name].codes, +select.value]);
      const outcome = form.outcome.value;
      const counts = {};
      found = [];
      for (let row = 0; row < rows; row++) {
        if (chosen.some(([codes, code]) => codes[row] !== code)) continue;
        if (hits && !searched.some((name, index) => hits[index][columns[name].codes[row]])) continue;
        const own = at("outcome", row);
        const forgotten = at("forgotten", row);
        counts[""] = (counts[""] || 0) + 1;
        counts[own] = (counts[own] || 0) + 1;
        if (forgotten) counts.forgotten = (counts.forgotten || 0) + 1;
        if (!outcome || own === outcome || (outcome === "forgotten" && forgotten)) found.push(row);
      }
      for (const output of form.querySelectorAll("output")) {
        output.textContent = (counts[output.dataset.count] || 0).toLocaleString("en");
      }
      page = 0;
      show();
    };

    const cell = (heading, text, note, kind) => {
      const made = element("td");
      made.dataset.label = heading;
      made.append(element("span", text, { className: "output" }));
      if (note) made.append(element("small", note, { className: kind || "" }));
      return made;
    };

    const line = (row) => {
      const outcome = at("outcome", row);
      const old = at("old", row);
      const scenario = columns.scenario.values.length > 1 ? ` · ${at("scenario", row)}` : "";
      const seed = columns.seed.values.length > 1 ? `, seed ${at("seed", row)}` : "";
      const said = at("base", row);
      const made = element("tr");
      const question = element("th", at("question", row), { scope: "row" });
      question.append(element("small", `${at("kind", row)}, fact of round ${at("learnt", row)}${scenario}`));
      const forgotten = at("forgotten", row) ? ", right when it was learnt" : "";
      made.append(
        question,
        cell("Asked of", at("method", row), `after round ${at("trained", row)}${seed}`),
        cell("Expected", at("expected", row), old && `old answer: ${old}`),
        cell("Answer", at("output", row) || "(nothing)", WORDS[outcome] + forgotten, `gives ${outcome}`),
        cell("Before editing", said === null ? "–" : said || "(nothing)"),
      );
      return made;
    };

    const show = () => {
      const first = page * PAGE;
      const last = Math.min(first + PAGE, found.length);
      body.replaceChildren(...found.slice(first, last).map(line));
      const number = (value) => value.toLocaleString("en");
      count.textContent = found.length
        ? `${number(first + 1)}–${number(last)} of ${number(found.length)} answers`
        : "No answer fits these filters.";
      table.hidden = !found.length;
      pages.hidden = found.length <= PAGE;
      pages.querySelector("span").textContent = `Page ${number(page + 1)} of ${number(Math.ceil(found.length / PAGE))}`;
      before.disabled = page === 0;
      after.disabled = last === found.length;
    };

    form.search.addEventListener("input", filter);
    form.addEventListener("change", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    pages.addEventListener("click", (event) => {
      if (!event.target.dataset.go) return;
      page += +event.target.dataset.go;
      show();
      document.getElementById("answers").scrollIntoView();
    });
    form.hidden = false;
    filter();
    document.documentElement.dataset.listed = "yes";
  };

  unfold("answers-data").then(JSON.parse).then(start).catch((error) => {
    console.error(error);
    count.textContent = "This browser could not read the answers: " + error.message;
  });
})();
