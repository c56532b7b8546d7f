"use strict";
// Sliders over pictures, values of curves, copying. All of it is read from the page, and words are only set as text.

document.documentElement.classList.add("js");

const json = (script) => JSON.parse(script.textContent);
const all = (selector, start, within = document) => within.querySelectorAll(selector).forEach(start);

// Pictures that are not seen at first lie in one block, read when it is first needed.
const pictures = new Map();
let hidden = null;

function source(digest) {
  hidden ??= json(document.getElementById("pictures-data"));
  return pictures.get(digest) ?? hidden[digest];
}

function startSlider(gallery) {
  const frames = json(gallery.querySelector("script.frames"));
  const range = gallery.querySelector("input[type=range]");
  const output = gallery.querySelector("output");
  const tiles = [...gallery.querySelectorAll(".tile")];
  const play = gallery.querySelector(".play");
  let timer = 0;

  function show() {
    const frame = frames[range.valueAsNumber];
    output.textContent = frame.label;
    range.setAttribute("aria-valuetext", frame.label);
    frame.tiles.flat().forEach(([digest, model], number) => {
      const image = tiles[number].querySelector("img");
      const prompt = tiles[number].closest(".prompt").querySelector("figcaption");
      tiles[number].querySelector(".model").textContent = model;
      if (prompt) image.alt = `${model}: ${prompt.textContent}`;
      if (image.dataset.picture !== digest) {
        image.dataset.picture = digest;
        image.src = source(digest);
      }
    });
  }
  function move(by) {
    range.valueAsNumber = (range.valueAsNumber + by + frames.length) % frames.length;
    show();
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }
  function start() {
    timer = setInterval(move, 900, 1);
    play.textContent = "Stop";
    play.setAttribute("aria-pressed", "true");
  }
  range.addEventListener("input", () => { stop(); show(); });
  gallery.querySelector(".back").addEventListener("click", () => { stop(); move(-1); });
  gallery.querySelector(".on").addEventListener("click", () => { stop(); move(1); });
  play.addEventListener("click", () => (timer ? stop() : start()));
  range.setAttribute("aria-valuetext", output.textContent);
}

function startChart(figure) {
  const curves = json(figure.querySelector("script.points"));
  const plot = figure.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const cursor = plot.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const places = [...new Set(curves.flatMap((curve) => curve.points.map(([x]) => x)))].sort((a, b) => a - b);
  let at = places.length - 1;

  // Of each curve the point nearest to the cursor, where it has one there.
  function said(x) {
    const words = [];
    for (const curve of curves) {
      const near = curve.points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
      if (Math.abs(near[0] - x) > 4) continue;
      const name = curves.some((other) => other.label !== curve.label) ? `${curve.label}: ` : "";
      const raw = curve.noisy ? ` (logged ${near[3]})` : "";
      words.push(`${words.length ? "" : `step ${near[1]} · `}${name}${near[2]}${raw}`);
    }
    return words.join(" · ");
  }
  function show(index) {
    at = Math.max(0, Math.min(places.length - 1, index));
    cursor.setAttribute("x1", places[at]);
    cursor.setAttribute("x2", places[at]);
    cursor.setAttribute("visibility", "visible");
    readout.textContent = said(places[at]);
    plot.setAttribute("aria-valuenow", at);
    plot.setAttribute("aria-valuetext", readout.textContent);
  }
  function hide() {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  }
  function nearest(x) {
    const distance = (index) => Math.abs(places[index] - x);
    return places.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0);
  }
  const far = Math.max(1, Math.round(places.length / 10));
  const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far, Home: -Infinity, End: Infinity };
  const attributes = { tabindex: 0, role: "slider", "aria-valuemin": 0, "aria-valuemax": places.length - 1, "aria-valuenow": at };
  for (const [name, value] of Object.entries(attributes)) plot.setAttribute(name, value);
  plot.setAttribute("aria-label", `values of ${figure.querySelector("strong").textContent}`);
  plot.addEventListener("focus", () => show(at));
  plot.addEventListener("blur", hide);
  plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) hide(); });
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width));
  });
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(at + steps[event.key]);
  });
}

function startCopy(button) {
  const text = button.parentElement.querySelector("pre");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // then the reader's own keys copy it
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

all("img[data-picture][src]", (image) => pictures.set(image.dataset.picture, image.src));
all("img[data-picture]:not([src])", (image) => { image.src = source(image.dataset.picture); });
all(".gallery:has(.slider)", startSlider);
all("figure.chart", startChart);
all("button.copy", startCopy);
addEventListener("beforeprint", () => all("details", (details) => { details.open = true; }));
performance.mark("interactive");
