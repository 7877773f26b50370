// What every page needs: data unfolded from the file, and paper that shows what the screen folds away, except what is
// technical.
"use strict";

// The text of an element that holds base64 of gzip.
async function unfold(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

{
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open]):not(.technical)")];
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of folded) part.open = false; });
}

// A figure drawn in a closed fold has no width of its own yet.
addEventListener("toggle", () => dispatchEvent(new Event("resize")), true);
