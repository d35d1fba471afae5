// The differences between any two runs.
(function configurations() {
  const place = document.getElementById("difference");
  const runs = DATA.configurations;
  if (runs.length < 2) {
    place.append(el("p", { class: "said" }, "Nothing to compare: fewer than two runs."));
    return;
  }
  const several = unique(runs.map((run) => run.chapter)).length > 1;
  const trained = runs.map((run, i) => i).filter((i) => Object.keys(runs[i].values).some((key) => key.startsWith("train.")));
  const state = { first: trained[0] ?? 0, second: trained.find((i) => runs[i].values.method !== runs[trained[0]].values.method) ?? 1, all: false };

  // Allows line breaks between the words of a long key.
  function breakable(key) {
    return key.split(/(?<=[._])/).flatMap((word, i) => (i ? [el("wbr"), word] : [word]));
  }

  function options() {
    return runs.map((run, i) => [i, several ? `${run.chapter}: ${run.label}` : run.label]);
  }

  const body = el("tbody");
  const heads = [el("th", { scope: "col", class: "text" }), el("th", { scope: "col", class: "text" })];
  const status = el("p", { class: "count", role: "status" });
  const notes = el("div");
  const every = el("input", { type: "checkbox" });
  every.addEventListener("change", () => { state.all = every.checked; show(); });

  function select(label, which) {
    return choice(label, options(), state[which], (value) => { state[which] = Number(value); show(); }, `wide ${which}`);
  }

  function show() {
    const [one, two] = [runs[state.first], runs[state.second]];
    const keys = unique([...Object.keys(one.values), ...Object.keys(two.values)]).sort();
    const different = keys.filter((key) => one.values[key] !== two.values[key]);
    status.textContent = `${different.length} of ${keys.length} settings differ`;
    [one, two].forEach((run, i) => { heads[i].replaceChildren(el("button", { type: "button", disabled: true }, run.label)); });
    body.replaceChildren(...(state.all ? keys : different).map((key) => {
      const cell = (run) => el("td", {}, run.values[key] === undefined ? "–" : run.values[key]);
      const differs = one.values[key] !== two.values[key];
      return el("tr", { class: differs ? "differs" : "same" }, el("th", { scope: "row" }, ...breakable(key)), cell(one), cell(two));
    }));
    notes.replaceChildren(...[one, two].filter((run) => run.note).map((run) => el("p", { class: "said" }, `${run.label}: ${run.note}.`)));
  }

  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "text" }, el("button", { type: "button", disabled: true }, "Setting")), ...heads));
  place.append(
    el("div", { class: "controls" }, select("First run", "first"), select("Second run", "second"),
      el("label", { class: "check" }, every, "Show equal settings")),
    status,
    el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Differences between two runs" },
      el("table", { class: "difference" }, head, body)),
    notes);
  show();
})();
