// Sorting: a click on a heading sorts, a second reverses, a third restores the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  function value(row, column) {
    const text = row.cells[column].dataset.sort;
    if (text === undefined) return null;
    if (!heads[column].classList.contains("number")) return isFigure(column) ? Number(text) : text;
    return Number(text);
  }

  // Text columns with numeric values (bars) are sorted as numbers.
  function isFigure(column) {
    return original.every((row) => {
      const text = row.cells[column].dataset.sort;
      return text === undefined || (text !== "" && Number.isFinite(Number(text)));
    });
  }

  function compare(one, two) {
    if (typeof one === "number" && typeof two === "number") return one - two;
    return String(one).localeCompare(String(two), "en", { numeric: true });
  }

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const cycle = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const before = head.getAttribute("aria-sort");
      const order = cycle[(cycle.indexOf(before) + 1) % cycle.length];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const rows = [...original];
      if (order !== "none") {
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((first, second) => {
          const one = value(first, column);
          const two = value(second, column);
          if (one === null || two === null) return (one === null) - (two === null);
          return sign * compare(one, two);
        });
      }
      table.classList.toggle("unsorted", order === "none");
      body.append(...rows);
    });
  });
}

// Search in long tables: rows with all words stay.
for (const box of document.querySelectorAll(".searched")) {
  const rows = [...box.querySelectorAll("tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const count = el("p", { class: "count", role: "status" });
  const search = el("input", { type: "search", placeholder: "e.g. a run, commit or seed", autocomplete: "off" });
  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
  }
  search.addEventListener("input", show);
  box.addEventListener("showall", () => { search.value = ""; show(); });
  box.before(el("div", { class: "controls" }, el("label", { class: "wide" }, "Filter rows", search)), count);
  show();
}

// Following a link expands everything around its target.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) {
    if (node.tagName === "DETAILS") node.open = true;
  }
  if (target && target.hidden) {
    target.closest(".searched").dispatchEvent(new Event("showall"));
    target.scrollIntoView();
  }
}
addEventListener("hashchange", unfold);
unfold();
