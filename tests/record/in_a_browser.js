// What the tests ask of a page.
const plotOf = (title) =>
  [...document.querySelectorAll("svg.plot")].find((it) => it.parentNode.querySelector(".title span").textContent === title);

function panel(title) {
  const svg = plotOf(title);
  svg.scrollIntoView({ block: "center" });
  const { left, top, width, height } = svg.getBoundingClientRect();
  const ticks = [...svg.querySelectorAll("text.x")].map((it) => it.firstChild.textContent);
  return { left, top, width, height, low: Number(svg.dataset.low), high: Number(svg.dataset.high), ticks };
}

function told() {
  const tip = document.querySelector(".tip");
  return tip.hidden ? "" : tip.innerText;
}

function sortedBy(name) {
  const head = [...document.querySelectorAll("th.number")].find((it) => it.textContent === name);
  head.click();
  return [...head.closest("table").tBodies[0].rows].map((it) => Number(it.cells[head.cellIndex].innerText));
}

// The luminance of the plots' background, and the least contrast of text and of lines: WCAG 2.2.
function contrasts() {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((it) => (it / 255 <= 0.04045 ? it / 255 / 12.92 : ((it / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const card = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
  const least = (selector, property) =>
    Math.min(...[...document.querySelectorAll(selector)].map((it) => light(getComputedStyle(it)[property])).map((it) => Math.max(it, card) / Math.min(it, card)));
  return [card, Math.min(least("svg.plot text", "fill"), least(".title, .tools .key, p", "color")), least("svg.plot g path", "stroke")];
}

// The widths of the section's table and its frame, and the places of the first row's first two cells.
function tableOf(section, scrollTo = 0) {
  const heads = [...document.querySelectorAll("section h2")];
  const frame = heads.find((it) => it.textContent === section).parentElement.querySelector(".scroll");
  frame.scrollLeft = scrollTo;
  const cells = [...frame.querySelectorAll("tbody tr:first-child > *")];
  const [first, second] = cells.map((it) => it.getBoundingClientRect().left);
  return { table: frame.scrollWidth, frame: frame.clientWidth, columns: cells.length, scrolled: frame.scrollLeft, first, second };
}
