"use strict";
// Replaces a page's plots by ones to hover over and to zoom into. Without it, the plots stay as they are.
// A figure's data: xs, lists of steps; panels, each with lines {name, group, colour, x: index in xs, y}.
const SVG = "http://www.w3.org/2000/svg", HEIGHT = 230, MARGIN = { left: 54, right: 20, top: 8, bottom: 36 };
const MANY = 10, LEGEND = 8; // more lines than this are named one at a time

function add(parent, name, attributes = {}, text) {
  const made = parent.namespaceURI === SVG || name === "svg" ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) key === "style" ? Object.assign(made.style, value) : made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "not finite";
  const few = Number(value.toPrecision(5));
  return few && Math.abs(few) < 1e-3 ? few.toExponential() : String(few);
}

function ticks(low, high, log, wanted) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const factor of high / low < 8 ? [1, 2, 3, 5] : high / low < 30 ? [1, 2, 5] : [1]) found.push(factor * 10 ** power);
    const inside = found.filter((it) => it >= low * 0.999 && it <= high * 1.001);
    const every = Math.ceil(inside.length / wanted);
    if (inside.length > 1) return inside.filter((_, index) => index % every === 0);
  }
  const rough = (high - low) / wanted || 1, size = 10 ** Math.floor(Math.log10(rough));
  const step = size * ([1, 2, 5, 10].find((it) => it * size >= rough) || 10), found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  return size && size < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
}

const scale = (from, to, log) => {
  const [f, low, high] = log ? [Math.log, Math.log(from[0]), Math.log(from[1])] : [(it) => it, ...from];
  const one = (value) => to[0] + ((f(value) - low) / (high - low || 1)) * (to[1] - to[0]);
  one.back = (place) => {
    const value = low + ((place - to[0]) / (to[1] - to[0])) * (high - low);
    return log ? Math.exp(value) : value;
  };
  return one;
};

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    sorted[middle] < value ? (low = middle) : (high = middle);
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

const tip = add(document.body, "div", { class: "tip", role: "status", hidden: "" });

function tell(x, y, title, rows) {
  tip.replaceChildren();
  if (title) add(tip, "strong", {}, title);
  for (const [colour, text] of rows) {
    const row = add(tip, "div");
    if (colour) add(row, "i", { style: { background: colour } });
    row.append(text);
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, Math.min(y + 12, innerHeight - box.height - 4))}px` });
}

const untell = () => (tip.hidden = true);
addEventListener("scroll", untell, { passive: true });
addEventListener("pointerdown", (event) => event.target.closest("svg") || untell());

class Chart {
  constructor(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    this.hidden = new Set();
    this.zoom = null; // the range of steps shown, in all panels that have steps
    const box = document.createElement("div");
    this.tools = add(box, "div", { class: "tools" });
    const grid = add(box, "div", { class: "panels" });
    this.panels = data.panels.map((panel, index) => new Panel(this, grid, panel, data.xs, index));
    this.legend();
    this.reset = add(this.tools, "button", { type: "button", hidden: "" }, "show all steps");
    this.reset.onclick = () => this.show(null);
    const still = figure.querySelector(".static");
    still.after(box);
    still.hidden = true;
    new ResizeObserver(() => this.draw()).observe(grid);
    this.draw();
  }

  legend() {
    const keys = new Map();
    for (const line of this.panels.flatMap((panel) => panel.lines))
      if (!line.scatter) keys.set(line.group || line.name, line);
    const marked = this.panels.some((panel) => panel.data.best !== undefined);
    if (this.panels.every((panel) => panel.lines.length < 2)) keys.clear();
    const order = [...keys];
    if (order[0]?.[1].group) order.reverse(); // the best is drawn last
    order.slice(0, LEGEND).forEach(([name, line]) => {
      const key = add(this.tools, "button", { type: "button", class: "key", "aria-pressed": "true", title: name });
      add(key, "i", { style: { background: line.colour, opacity: line.faint ? 0.5 : 1 } });
      key.append(name);
      key.onclick = () => {
        this.hidden.delete(name) || this.hidden.add(name);
        key.setAttribute("aria-pressed", String(!this.hidden.has(name)));
        this.draw();
      };
    });
    if (order.length > LEGEND) add(this.tools, "span", {}, `and ${order.length - LEGEND} more`);
    if (marked) add(add(this.tools, "span", { class: "mark" }), "i").after("best step");
  }

  show(range) {
    this.zoom = range;
    this.reset.hidden = !range;
    untell();
    this.draw();
  }

  draw() {
    for (const panel of this.panels) panel.draw();
  }
}

class Panel {
  constructor(chart, parent, data, xs, index) {
    Object.assign(this, { chart, data, log: Boolean(data.log) });
    this.lines = data.lines.map((line) => ({ ...line, x: xs[line.x] }));
    this.hasSteps = !this.lines.some((line) => line.scatter);
    const box = add(parent, "div");
    const title = add(box, "div", { class: "title" });
    add(title, "span", {}, data.title);
    if (this.lines.every((line) => line.y.every((value) => value === null || value > 0))) {
      const button = add(title, "button", { type: "button", "aria-pressed": String(this.log), title: "logarithmic axis" }, "log");
      button.onclick = () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", String(this.log));
        this.draw();
      };
    }
    this.svg = add(box, "svg", { class: "plot", tabindex: "0", role: "img", "aria-label": `${data.title}, a plot to hover over` });
    this.clip = `clip-${document.querySelectorAll("svg.plot").length}-${index}-${Math.random().toString(36).slice(2)}`;
    this.listen();
  }

  listen() {
    const svg = this.svg, place = (event) => [event.clientX - svg.getBoundingClientRect().left, event.clientY - svg.getBoundingClientRect().top];
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      from = this.hasSteps && event.button === 0 ? place(event)[0] : null;
      this.hover(...place(event), event);
    });
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (from === null || Math.abs(x - from) < 6) return this.hover(x, y, event);
      svg.setPointerCapture(event.pointerId);
      untell();
      this.over.replaceChildren();
      add(this.over, "rect", { class: "chosen", x: Math.min(x, from), y: MARGIN.top, width: Math.abs(x - from), height: HEIGHT - MARGIN.top - MARGIN.bottom });
    });
    svg.addEventListener("pointerup", (event) => {
      const [x] = place(event), start = from;
      from = null;
      if (start === null || Math.abs(x - start) < 6) return;
      const inside = [start, x].sort((a, b) => a - b).map((it) => this.x.back(Math.max(MARGIN.left, Math.min(it, this.width - MARGIN.right))));
      if (this.lines.some((line) => line.x.some((it) => it >= inside[0] && it <= inside[1]))) this.chart.show(inside);
      else this.over.replaceChildren();
    });
    svg.addEventListener("mousedown", (event) => event.preventDefault()); // neither text nor the plot is selected
    const leave = (event) => {
      from = null;
      if (event.pointerType === "touch" && event.type === "pointerleave") return; // a tap stays
      for (const panel of this.chart.panels) panel.over?.replaceChildren();
      untell();
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointercancel", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("dblclick", () => this.hasSteps && this.chart.show(null));
    svg.addEventListener("keydown", (event) => {
      const all = this.hasSteps ? [...new Set(this.visible().flatMap((line) => line.x))].sort((a, b) => a - b).filter((it) => it >= this.range[0] && it <= this.range[1]) : [];
      if (!all.length) return;
      const at = this.step === undefined ? 0 : nearest(all, this.step), [low, high] = this.range, middle = all[at];
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        const step = all[Math.max(0, Math.min(all.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)))], box = svg.getBoundingClientRect();
        this.hover(this.x(step), HEIGHT / 2, { clientX: box.left + this.x(step), clientY: box.top + HEIGHT / 2 });
      } else if (event.key === "+") this.chart.show([middle - (middle - low) / 2, middle + (high - middle) / 2]);
      else if (event.key === "Escape" || event.key === "-") this.chart.show(null);
      else return;
      event.preventDefault();
    });
  }

  visible() {
    return this.lines.filter((line) => !this.chart.hidden.has(line.group || line.name));
  }

  draw() {
    const lines = this.visible(), data = this.data, svg = this.svg;
    this.width = svg.clientWidth || 320;
    svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    svg.replaceChildren();
    const extent = (values) => values.reduce(([a, b], it) => [Math.min(a, it), Math.max(b, it)], [Infinity, -Infinity]);
    let range = extent(this.lines.flatMap((line) => line.x));
    if (data.ticks) range = [-0.5, data.ticks.length - 0.5];
    else if (!this.hasSteps) range = data.logX ? [range[0] / 1.2, range[1] * 1.2] : [range[0] - (range[1] - range[0]) * 0.05, range[1] + (range[1] - range[0]) * 0.05];
    else if (this.chart.zoom) range = [Math.max(range[0], this.chart.zoom[0]), Math.min(range[1], this.chart.zoom[1])];
    if (!(range[1] > range[0])) range = this.chart.zoom && this.hasSteps ? this.chart.zoom : [range[0] - 0.5, range[0] + 0.5];
    this.range = range;
    const inside = (line, index) => line.y[index] !== null && line.x[index] >= range[0] && line.x[index] <= range[1];
    let [low, high] = extent(lines.flatMap((line) => line.y.filter((_, index) => inside(line, index))));
    if (!(low <= high)) [low, high] = [0.1, 1];
    const log = this.log && low > 0;
    if (log) [low, high] = [low / 1.05, high * 1.05];
    else if (low === high) [low, high] = [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
    else [low, high] = [low - (high - low) * 0.05, high + (high - low) * 0.05];
    this.x = scale(range, [MARGIN.left, this.width - MARGIN.right], data.logX);
    this.y = scale([low, high], [HEIGHT - MARGIN.bottom, MARGIN.top], log);
    svg.dataset.low = range[0];
    svg.dataset.high = range[1];
    this.axes([low, high], log);
    const clip = add(svg, "clipPath", { id: this.clip });
    add(clip, "rect", { x: MARGIN.left - 4, y: 0, width: this.width - MARGIN.left - MARGIN.right + 8, height: HEIGHT - MARGIN.bottom + 4 });
    const body = add(svg, "g", { "clip-path": `url(#${this.clip})` });
    if (data.best !== undefined && data.best >= range[0] && data.best <= range[1]) this.best(body);
    this.paths = new Map();
    for (const line of lines) this.line(body, line, lines.length);
    this.over = add(svg, "g");
  }

  axes(values, log) {
    const [bottom, data] = [HEIGHT - MARGIN.bottom, this.data];
    for (const value of ticks(...values, log, 5)) {
      add(this.svg, "line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: this.y(value), y2: this.y(value) });
      add(this.svg, "text", { x: MARGIN.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value));
    }
    const names = data.ticks, room = (this.width - MARGIN.left) / (names ? names.length : 1), fits = Math.max(3, Math.floor(room / 6));
    const every = names ? Math.ceil(14 / room) : 1;
    for (const value of names ? names.map((_, index) => index).filter((index) => index % every === 0) : ticks(...this.range, data.logX, this.width / 80).filter((it) => !this.hasSteps || Number.isInteger(it))) {
      const text = names ? names[value] : short(value), x = this.x(value);
      add(this.svg, "line", { class: "grid", x1: x, x2: x, y1: MARGIN.top, y2: bottom });
      const mark = add(this.svg, "text", { class: "x", x, y: bottom + 15, "text-anchor": "middle" }, text.length > fits ? `${text.slice(0, fits - 1)}…` : text);
      add(mark, "title", {}, text);
    }
    add(this.svg, "text", { x: (MARGIN.left + this.width - MARGIN.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, data.x);
  }

  best(body) {
    const x = this.x(this.data.best);
    add(body, "line", { class: "best-step", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    if (this.data.bestValue !== undefined) add(body, "circle", { class: "ring", cx: x, cy: this.y(this.data.bestValue), r: 5.5 });
  }

  line(body, line, count) {
    const few = line.y.filter((it) => it !== null).length <= 30 && count <= MANY && !line.faint, style = { stroke: line.colour };
    let path = "", isDown = false;
    line.y.forEach((value, index) => {
      const x = this.x(line.x[index]);
      if (value === null) {
        isDown = false;
        const y = HEIGHT - MARGIN.bottom - 6;
        add(body, "path", { style, d: `M${x - 3},${y - 3}l6,6m0,-6l-6,6` });
        return;
      }
      const y = this.y(value), isAlone = (line.y[index - 1] ?? null) === null && (line.y[index + 1] ?? null) === null;
      if (line.scatter || few || isAlone) add(body, "circle", { cx: x, cy: y, r: line.scatter ? 4 : 2.3, style: { fill: line.colour, opacity: line.scatter ? 0.75 : 1 } });
      path += `${isDown ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
      isDown = true;
    });
    if (!line.scatter) this.paths.set(line, add(body, "path", { class: `${count > MANY ? "few" : ""} ${line.faint ? "faint" : ""}`, style, d: path }));
  }

  hover(px, py, event) {
    const lines = this.visible().filter((line) => line.x.length);
    if (!lines.length || !this.over) return;
    for (const panel of this.chart.panels) panel.over?.replaceChildren();
    for (const path of this.paths.values()) path.classList.remove("over");
    if (!this.hasSteps) return this.point(px, py, event, lines);
    const value = this.x.back(px), at = (line) => nearest(line.x, value);
    const away = (line) => Math.abs(this.x(line.x[at(line)]) - px);
    let told = lines;
    if (lines.length > MANY) {
      const far = (line) => (line.y[at(line)] === null ? Infinity : Math.hypot(away(line), this.y(line.y[at(line)]) - py));
      told = [lines.reduce((a, b) => (far(b) < far(a) ? b : a))];
      this.paths.get(told[0])?.classList.add("over");
    }
    const closest = told.reduce((a, b) => (away(b) < away(a) ? b : a)), step = (this.step = closest.x[at(closest)]);
    for (const panel of this.chart.panels.filter((it) => it.hasSteps)) panel.cross(step, panel === this ? told : []);
    const rows = told.map((line) => {
      const index = nearest(line.x, step), its = line.x[index];
      return [line.colour, `${line.name}: ${shown(line.y[index])}${its === step ? "" : ` (${this.data.x} ${its})`}`];
    });
    tell(event.clientX, event.clientY, `${this.data.x} ${step}${step === this.data.best ? ", the best" : ""}`, rows);
  }

  cross(step, lines) {
    const x = this.x(step);
    if (step < this.range[0] || step > this.range[1]) return;
    add(this.over, "line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    for (const line of lines) {
      const index = nearest(line.x, step);
      if (line.y[index] !== null && line.x[index] >= this.range[0] && line.x[index] <= this.range[1])
        add(this.over, "circle", { cx: this.x(line.x[index]), cy: this.y(line.y[index]), r: 3.5, style: { fill: line.colour } });
    }
  }

  point(px, py, event, lines) {
    let found = null, least = 24;
    for (const line of lines)
      line.y.forEach((value, index) => {
        const far = value === null ? Infinity : Math.hypot(this.x(line.x[index]) - px, this.y(value) - py);
        if (far < least) [found, least] = [[line, index], far];
      });
    if (!found) return untell();
    const [line, index] = found;
    add(this.over, "circle", { class: "ring", cx: this.x(line.x[index]), cy: this.y(line.y[index]), r: 7 });
    tell(event.clientX, event.clientY, line.labels[index], [[line.colour, `${line.name}: ${shown(line.y[index])}`]]);
  }
}

for (const figure of document.querySelectorAll("figure.chart")) new Chart(figure);

for (const each of document.querySelectorAll("[data-tip]")) {
  each.querySelector("title")?.remove(); // the browser's own, which comes a second later
  each.addEventListener("pointermove", (event) => tell(event.clientX, event.clientY, "", [["", each.dataset.tip]]));
  each.addEventListener("pointerleave", untell);
}

for (const head of document.querySelectorAll(".sorts thead th")) {
  const table = head.closest("table");
  head.addEventListener("click", () => {
    const column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending" ? 1 : -1;
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[column], text = (cell.querySelector("[title]") || cell).title || cell.textContent.trim();
      const times = [...text.matchAll(/([\d.]+) (h|min|s)(?= |$)/g)].map((it) => it[1] * { h: 3600, min: 60, s: 1 }[it[2]]);
      const number = times.length ? times.reduce((a, b) => a + b) : parseFloat(text.replace(/\u202f/g, "").replace("−", "-"));
      return Number.isNaN(number) ? text : number;
    };
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    // Text in a column of numbers ("–") comes last in both directions.
    rows.sort(([a], [b]) => (typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : up * (a < b ? -1 : a > b ? 1 : 0)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
}
