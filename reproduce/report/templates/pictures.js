// The image grid: a block per prompt, a tile per row of the table, all at one iteration.
const EXACT_SIDE = 160;
const FIRST_PROMPTS = 6;

function pictureOf(tile, prompt, position) {
  const known = tile.frames.filter((frame) => frame.images[prompt]);
  if (tile.end === null) return known[0] || null;
  const wanted = Math.min(position, tile.end);
  return known.find((frame) => frame.at === wanted) || null;
}

function imageNode(name, alt) {
  const image = el("img", { src: IMAGES[name], alt, decoding: "sync" });
  // Small images are not smoothed.
  const check = () => image.classList.toggle("exact", image.naturalWidth <= EXACT_SIDE);
  if (image.complete) check();
  image.addEventListener("load", check);
  return image;
}

class Pictures {
  constructor(place) {
    this.data = DATA.chapters[place.dataset.chapter].pictures;
    const { data } = this;
    this.groups = unique(data.tiles.filter((t) => t.group).map((t) => t.group));
    this.group = this.groups.length > 1 ? this.groups[0] : "";
    this.seed = data.seeds[0];
    this.reward = (data.rewards.find((r) => data.tiles.some((t) => t.trained.includes(r.key))) || data.rewards[0]).key;
    this.filter = "";
    this.whole = false;
    this.more = el("button", { type: "button", class: "plain more" });
    this.more.addEventListener("click", () => { this.whole = !this.whole; this.draw(); });
    this.position = data.positions.length - 1;
    this.list = el("div");
    this.count = el("p", { class: "count", role: "status" });
    place.append(...this.controls(), this.count, this.list, this.more);
    this.draw();
  }

  controls() {
    const { data } = this;
    const search = el("input", { type: "search", placeholder: "part of a prompt", autocomplete: "off" });
    search.addEventListener("input", () => { this.filter = search.value; this.draw(); });
    const last = data.positions.length - 1;
    this.slider = el("input", { type: "range", min: 0, max: last, step: 1, value: last, disabled: last < 1, "aria-label": "Training iteration" });
    this.moment = el("b", {});
    this.slider.addEventListener("input", () => { this.position = Number(this.slider.value); this.draw(); });
    const box = el("div", { class: "controls" }, el("label", { class: "wide filter" }, "Filter prompts", search));
    if (this.groups.length > 1) {
      const options = [["", "All"], ...this.groups.map((g) => [g, g])];
      box.append(choice(data.group_label, options, this.group, (v) => { this.group = v; this.draw(); }, "group"));
    }
    if (data.seeds.length > 1) {
      box.append(choice("Training seed", data.seeds.map((s) => [s, s]), this.seed, (v) => { this.seed = Number(v); this.draw(); }, "seed"));
    }
    box.append(
      choice("Score", data.rewards.map((r) => [r.key, r.label]), this.reward, (v) => { this.reward = v; this.draw(); }, "score"));
    const bar = el("div", { class: "moment" }, el("span", {}, "Training: ", this.moment), this.slider);
    return [box, bar];
  }

  tiles() {
    return this.data.tiles.filter((tile) =>
      (!this.group || !tile.group || tile.group === this.group) && (tile.seed === null || tile.seed === this.seed));
  }

  prompts() {
    const wanted = this.filter.trim().toLowerCase();
    return this.data.prompts.filter((prompt) => prompt.text.toLowerCase().includes(wanted));
  }

  at() {
    return this.data.positions[this.position];
  }

  // Whether any trained row has an image of the prompt at this iteration.
  isThere(prompt, at) {
    const trained = this.tiles().filter((tile) => tile.end !== null);
    return !trained.length || trained.some((tile) => pictureOf(tile, prompt.id, at));
  }

  name(tile) {
    return tile.group && !this.group && this.groups.length > 1 ? `${tile.label} (${tile.group})` : tile.label;
  }

  draw() {
    const at = this.at();
    const where = at === 0 ? "before the first iteration" : `after ${at} iteration${at === 1 ? "" : "s"}`;
    this.moment.textContent = where;
    this.slider.setAttribute("aria-valuetext", where);
    const found = this.prompts();
    const prompts = found.filter((prompt) => this.isThere(prompt, at));
    const { prompts: all, there } = this.data;
    const kept = there > all.length ? ` (of ${there} with images)` : "";
    const later = found.length - prompts.length;
    const without = later ? `; ${later} more without an image at this iteration` : "";
    this.count.textContent = `${prompts.length} of ${all.length} prompts${kept}${without}`;
    const cut = this.whole || this.filter.trim() ? prompts : prompts.slice(0, FIRST_PROMPTS);
    this.list.replaceChildren(...cut.map((prompt) => this.block(prompt)));
    this.more.hidden = prompts.length <= FIRST_PROMPTS || this.filter.trim() !== "";
    this.more.textContent = this.whole ? "Show fewer" : `Show all ${prompts.length} prompts`;
  }

  block(prompt) {
    const tiles = this.tiles().map((tile) => this.tile(tile, prompt));
    return el("section", { class: "prompt" }, el("h4", {}, prompt.text), el("div", { class: "tiles" }, ...tiles));
  }

  tile(tile, prompt) {
    const frame = pictureOf(tile, prompt.id, this.at());
    const caption = el("figcaption", {}, el("span", { class: "who" }, this.name(tile)), el("span", { class: "what" }, this.said(tile, frame, prompt)));
    if (!frame) {
      return el("figure", { class: "tile" }, el("div", { class: "absent" }, "no image at this iteration"), caption);
    }
    const alt = `${this.name(tile)}: ${prompt.text}`;
    const button = el("button", { type: "button", "aria-label": `Enlarge: ${alt}` }, imageNode(frame.images[prompt.id], alt));
    button.addEventListener("click", () => enlarge(this, tile, prompt));
    return el("figure", { class: "tile" }, button, caption);
  }

  said(tile, frame, prompt) {
    if (!frame) return "–";
    const reward = this.data.rewards.find((r) => r.key === this.reward);
    const score = (frame.scores[prompt.id] || {})[reward.key];
    const ended = tile.end !== null && this.at() > tile.end ? `, ended at ${tile.end}` : "";
    if (score === undefined) return `not scored${ended}`;
    const base = tile.frames.find((one) => one.at === 0 && (one.scores[prompt.id] || {})[reward.key] !== undefined);
    const difference = base && frame.at !== 0 ? ` (${signedNumber(score - base.scores[prompt.id][reward.key], reward.digits)})` : "";
    const mark = tile.trained.includes(reward.key) ? "†" : "";
    return `${score.toFixed(reward.digits)}${mark}${difference}${ended}`;
  }
}

function enlarge(pictures, tile, prompt) {
  const dialog = document.getElementById("enlarged");
  const tiles = pictures.tiles();
  let now = tiles.indexOf(tile);
  function show() {
    const chosen = tiles[now];
    const frame = pictureOf(chosen, prompt.id, pictures.at());
    const scores = el("dl", {});
    for (const reward of pictures.data.rewards) {
      const score = frame && (frame.scores[prompt.id] || {})[reward.key];
      const text = score === undefined || score === null ? "–" : score.toFixed(reward.digits);
      scores.append(el("div", {}, el("dt", {}, reward.label), el("dd", {}, text)));
    }
    const image = frame ? imageNode(frame.images[prompt.id], prompt.text) : el("div", { class: "absent" }, "no image at this iteration");
    dialog.replaceChildren(image, el("h4", {}, pictures.name(chosen)), el("p", {}, prompt.text), scores,
      el("div", { class: "row" },
        el("button", { type: "button", class: "plain", onclick: () => step(-1) }, "← Previous"),
        el("button", { type: "button", class: "plain", onclick: () => step(1) }, "Next →"),
        el("button", { type: "button", class: "plain", autofocus: true, onclick: () => dialog.close() }, "Close")));
  }
  function step(by) {
    now = (now + by + tiles.length) % tiles.length;
    show();
    dialog.querySelectorAll(".row button")[by < 0 ? 0 : 1].focus();
  }
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  };
  show();
  dialog.showModal();
}

for (const place of document.querySelectorAll(".pictures")) new Pictures(place);
