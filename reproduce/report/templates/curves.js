// Learning curves: one panel per group, redrawn when its width changes.
const DASHES = ["", "7 3", "8 3 2 3", "2 3", "10 2", "4 2 1 2 1 2"];
const EDGE = { left: 58, right: 14, top: 10, bottom: 34 };

function marker(style, x, y, size) {
  const s = size || 3;
  const shapes = [
    () => draw("circle", { cx: x, cy: y, r: s }),
    () => draw("rect", { x: x - s, y: y - s, width: 2 * s, height: 2 * s }),
    () => draw("path", { d: `M${x} ${y - s - 1}L${x + s + 1} ${y + s}H${x - s - 1}Z` }),
    () => draw("path", { d: `M${x} ${y - s - 1}L${x + s + 1} ${y}L${x} ${y + s + 1}L${x - s - 1} ${y}Z` }),
    () => draw("path", { d: `M${x} ${y + s + 1}L${x + s + 1} ${y - s}H${x - s - 1}Z` }),
    () => draw("path", { d: `M${x - 1} ${y - s - 1}h2v${s}h${s}v2h${-s}v${s}h-2v${-s}h${-s}v-2h${s}Z` }),
  ];
  const shape = shapes[style % shapes.length]();
  shape.setAttribute("class", `f${style % 6}`);
  return shape;
}

// Shifts the dashes on every pass through the colours, so that no two lines look alike.
function dash(style) {
  return DASHES[(style + Math.floor(style / 6)) % DASHES.length];
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return { found, digits: Math.max(0, Math.min(8, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0))) };
}

function verticalRange(series) {
  const means = series.flatMap((one) => one.y);
  let low = Math.min(...means);
  let high = Math.max(...means);
  // A wide band at one end must not flatten every curve.
  const room = 0.6 * (high - low || Math.abs(high) * 0.05 || 1);
  const bottoms = series.flatMap((one) => one.low || one.y);
  const tops = series.flatMap((one) => one.high || one.y);
  low = Math.max(low - room, Math.min(...bottoms));
  high = Math.min(high + room, Math.max(...tops));
  const margin = 0.06 * (high - low || Math.abs(high) * 0.1 || 1);
  return [low - margin, high + margin];
}

class Curves {
  constructor(place) {
    this.data = DATA.chapters[place.dataset.chapter].curves;
    this.metric = this.data.metrics[0].key;
    this.axis = this.data.axes[0].key;
    this.hidden = new Set();
    const { metrics, axes, names } = this.data;
    const controls = el("div", { class: "controls" },
      choice("Quantity", metrics.map((m) => [m.key, m.label + (m.smooth ? " (running mean)" : "")]), this.metric,
        (value) => { this.metric = value; this.redraw(); }, "metric"),
      choice("Against", axes.map((a) => [a.key, a.label]), this.axis,
        (value) => { this.axis = value; this.redraw(); }, "axis-choice"));
    const legend = el("div", { class: "legend", role: "group", "aria-label": "Curves shown" });
    names.forEach((name, style) => legend.append(this.legendButton(name, style)));
    this.panels = this.data.groups.map((group) => new Panel(this, group));
    const panels = el("div", { class: "panels" }, ...this.panels.map((panel) => panel.figure));
    place.append(controls, legend, panels, el("p", { class: "said" }, this.caption()));
    new ResizeObserver(() => this.redraw()).observe(panels);
  }

  legendButton(name, style) {
    const line = draw("svg", { width: 30, height: 12, "aria-hidden": "true" },
      draw("path", { d: "M1 6H29", class: `line s${style % 6}`, "stroke-dasharray": dash(style) }), marker(style, 15, 6));
    const button = el("button", { type: "button", class: "plain", "aria-pressed": "true" }, line, name);
    button.addEventListener("click", () => {
      const shown = this.hidden.delete(name) || !this.hidden.add(name);
      button.setAttribute("aria-pressed", String(shown));
      this.redraw();
    });
    return button;
  }

  caption() {
    const counts = unique(this.data.groups.flatMap((g) => g.lines.map((line) => line.seeds))).sort((a, b) => a - b);
    const most = counts[counts.length - 1];
    const seeds = counts.length === 1 ? `${most} seed${most > 1 ? "s" : ""}` : `${counts[0]} to ${most} seeds`;
    const band = most >= 3 ? " Bands: 95% t intervals over seeds." : " Bands need three seeds.";
    return `Mean over ${seeds}.${band} Hover, or use the arrow keys on a panel, to read values.`;
  }

  redraw() {
    for (const panel of this.panels) panel.draw();
  }
}

class Panel {
  constructor(curves, group) {
    this.curves = curves;
    this.group = group;
    this.at = null;
    this.svg = draw("svg", { tabindex: "0", role: "img" });
    this.readout = el("output", { class: "readout", "aria-live": "polite" });
    this.figure = el("figure", { class: "panel" },
      group.label ? el("figcaption", {}, group.label) : null, this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  lines() {
    const { metric, axis, hidden } = this.curves;
    return this.group.lines
      .filter((line) => !hidden.has(line.label) && line.series[metric] && line.series[metric].x[axis])
      .map((line) => ({ ...line, ...line.series[metric], x: line.series[metric].x[axis] }));
  }

  draw() {
    const width = Math.max(240, this.svg.clientWidth || 400);
    const height = this.svg.clientHeight || 272;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lines = this.lines();
    const metric = this.curves.data.metrics.find((m) => m.key === this.curves.metric).label;
    const axis = this.curves.data.axes.find((a) => a.key === this.curves.axis).label;
    this.svg.setAttribute("aria-label", `${this.group.label || "Curves"}: ${metric} against ${axis}`);
    this.svg.replaceChildren();
    if (!lines.length) {
      this.svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing to draw"));
      this.scale = null;
      return;
    }
    const right = Math.max(...lines.map((line) => line.x[line.x.length - 1])) || 1;
    const [low, high] = verticalRange(lines);
    const inner = { w: width - EDGE.left - EDGE.right, h: height - EDGE.top - EDGE.bottom };
    this.scale = {
      x: (v) => EDGE.left + (v / right) * inner.w,
      y: (v) => EDGE.top + (1 - (v - low) / (high - low)) * inner.h,
      value: (px) => ((px - EDGE.left) / inner.w) * right,
      width, height,
    };
    this.drawAxes(low, high, right, axis, inner);
    for (const line of lines) this.drawLine(line);
    this.overlay = draw("g");
    this.svg.append(this.overlay);
    this.move(this.at);
  }

  drawAxes(low, high, right, label, inner) {
    const { x, y, width, height } = this.scale;
    const id = `clip-${Math.random().toString(36).slice(2)}`;
    this.clip = id;
    this.svg.append(draw("clipPath", { id }, draw("rect", { x: EDGE.left, y: EDGE.top, width: inner.w, height: inner.h })));
    const vertical = ticks(low, high, 5);
    for (const value of vertical.found) {
      this.svg.append(
        draw("line", { class: "gridline", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
        draw("text", { x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(vertical.digits)));
    }
    for (const value of ticks(0, right, Math.max(2, Math.floor(inner.w / 80))).found) {
      this.svg.append(
        draw("line", { class: "axis", x1: x(value), x2: x(value), y1: height - EDGE.bottom, y2: height - EDGE.bottom + 4 }),
        draw("text", { x: x(value), y: height - EDGE.bottom + 16, "text-anchor": "middle" }, short(value)));
    }
    this.svg.append(
      draw("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: height - EDGE.bottom, y2: height - EDGE.bottom }),
      draw("text", { x: EDGE.left + inner.w / 2, y: height - 3, "text-anchor": "middle" }, label));
  }

  drawLine(line) {
    const { x, y } = this.scale;
    const group = draw("g", { "clip-path": `url(#${this.clip})` });
    const points = (values) => values.map((v, i) => `${x(line.x[i]).toFixed(1)} ${y(v).toFixed(1)}`);
    if (line.low) {
      const path = `M${points(line.high).join("L")}L${points(line.low).reverse().join("L")}Z`;
      group.append(draw("path", { d: path, class: `band f${line.style % 6}` }));
    }
    group.append(draw("path", {
      d: `M${points(line.y).join("L")}`, class: `line s${line.style % 6}`, "stroke-dasharray": dash(line.style),
    }));
    const every = Math.ceil(line.x.length / 10);
    line.y.forEach((v, i) => {
      if (i % every === 0 || i === line.y.length - 1) group.append(marker(line.style, x(line.x[i]), y(v)));
    });
    this.svg.append(group);
  }

  point(event) {
    if (!this.scale) return;
    const box = this.svg.getBoundingClientRect();
    this.move(this.scale.value((event.clientX - box.left) * (this.scale.width / box.width)));
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) {
      if (event.key === "Escape") this.move(null);
      return;
    }
    event.preventDefault();
    const places = unique(this.lines().flatMap((line) => line.x)).sort((a, b) => a - b);
    if (!places.length) return;
    let now = places.findIndex((place) => place === this.at);
    if (now < 0) now = step > 0 ? -1 : places.length;
    this.move(places[Math.max(0, Math.min(places.length - 1, now + step))]);
  }

  move(at) {
    this.at = at;
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    this.readout.replaceChildren();
    if (at === null || !this.scale) return;
    const { x, y, height } = this.scale;
    this.overlay.append(draw("line", { class: "guide", x1: x(at), x2: x(at), y1: EDGE.top, y2: height - EDGE.bottom }));
    for (const line of this.lines()) {
      const i = line.x.reduce((best, v, j) => (Math.abs(v - at) < Math.abs(line.x[best] - at) ? j : best), 0);
      this.overlay.append(marker(line.style, x(line.x[i]), y(line.y[i]), 4.5));
      const band = line.low ? ` [${short(line.low[i])}, ${short(line.high[i])}]` : "";
      this.readout.append(el("span", {}, el("b", {}, line.label), ` ${short(line.y[i])}${band} at ${short(line.x[i])}`));
    }
  }
}

for (const place of document.querySelectorAll(".curves")) new Curves(place);
