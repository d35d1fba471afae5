"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const IMAGES = JSON.parse(document.getElementById("images").textContent);
const SVG = "http://www.w3.org/2000/svg";

// Text only becomes a text node or an attribute value, because prompts may contain anything.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function choice(label, options, chosen, change, kind) {
  const select = el("select", { onchange: () => change(select.value) });
  for (const [value, text] of options) {
    select.append(el("option", { value, selected: String(value) === String(chosen) }, text));
  }
  return el("label", { class: kind }, label, select);
}

function unique(values) {
  return [...new Set(values)];
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, sign] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return String(Number((value / unit).toPrecision(3))) + sign;
  }
  return String(Number(value.toPrecision(4)));
}

function signedNumber(value, digits) {
  const text = value.toFixed(digits);
  if (Number(text) === 0) return text.replace("-", "");
  return value > 0 ? "+" + text : text;
}

(function theme() {
  const words = { auto: "Auto", light: "Light", dark: "Dark" };
  const order = Object.keys(words);
  const button = document.getElementById("theme");
  function show(name) {
    document.documentElement.dataset.theme = name;
    button.textContent = words[name];
    button.setAttribute("aria-label", "Colours: " + words[name]);
  }
  let name = "auto";
  // Browsers may deny storage to a page opened from disk.
  try { name = localStorage.getItem("g2rpo-theme") || "auto"; } catch { /* use the default */ }
  show(order.includes(name) ? name : "auto");
  button.addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    const next = order[(order.indexOf(now) + 1) % order.length];
    show(next);
    try { localStorage.setItem("g2rpo-theme", next); } catch { /* not saved */ }
  });
})();
