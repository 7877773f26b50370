// Draws the figures, one after the other so that the page stays alive, in the page's colours: light, dark, or on paper.
(() => {
  const options = { responsive: true, displayModeBar: false, showTips: false };

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const changes = {
      "font.color": colour("--ink"),
      "font.family": getComputedStyle(document.body).fontFamily,
      "font.size": 12,
      "hoverlabel.bgcolor": colour("--paper"),
      "hoverlabel.bordercolor": colour("--line"),
      "hoverlabel.font.color": colour("--ink"),
    };
    for (const axis of ["xaxis", "yaxis"]) {
      changes[axis + ".gridcolor"] = colour("--line");
      changes[axis + ".linecolor"] = colour("--line");
      changes[axis + ".tickfont.color"] = colour("--quiet");
      changes[axis + ".title.font.color"] = colour("--quiet");
    }
    return changes;
  };

  // The layout with changes written as Plotly writes them: "xaxis.title.font.color".
  const coloured = (layout) => {
    for (const [path, value] of Object.entries(colours())) {
      const steps = path.split(".");
      const last = steps.pop();
      steps.reduce((place, step) => (place[step] ??= {}), layout)[last] = value;
    }
    return layout;
  };

  const breath = () => new Promise((go) => setTimeout(go));

  const load = async () => {
    const library = document.createElement("script");
    library.textContent = await unfold("plotly");
    document.head.append(library);
  };

  const draw = async () => {
    const plots = JSON.parse(await unfold("plots"));
    await load();
    const repaint = () => Promise.all(Object.keys(plots).map((id) => Plotly.relayout(id, colours())));
    for (const [id, plot] of Object.entries(plots)) {
      await breath();
      await Plotly.newPlot(id, plot.data, coloured(plot.layout), options);
    }
    for (const query of ["(prefers-color-scheme: dark)", "print"]) {
      matchMedia(query).addEventListener("change", repaint);
    }
    document.documentElement.dataset.drawn = "yes";
  };

  breath().then(draw).catch((error) => {
    console.error(error);
    for (const place of document.querySelectorAll(".plot")) {
      place.textContent = "This browser could not draw the figure: " + error.message;
    }
  });
})();
