// Navigation between parts, and the name of the current part.
(function navigation() {
  const select = document.getElementById("goto");
  const steps = { previous: document.getElementById("previous"), next: document.getElementById("next") };
  const targets = [...select.options].map((option) => document.getElementById(option.value));
  // The overview and the chapters, for the two arrows.
  const wholes = targets.map((target, i) => i).filter((i) => !targets[i].matches("h3"));
  let quiet = 0;

  function shown() {
    // The last part may be too short to reach the top.
    const line = innerHeight / 3;
    let found = 0;
    targets.forEach((target, i) => { if (target.getBoundingClientRect().top <= line) found = i; });
    return found;
  }

  function tell(index) {
    select.selectedIndex = index;
    const whole = wholes.filter((i) => i <= index).length - 1;
    steps.previous.disabled = whole <= 0;
    steps.next.disabled = whole >= wholes.length - 1;
    return whole;
  }

  function go(index) {
    // Ignores the parts that smooth scrolling passes.
    quiet = Date.now() + 800;
    const { value } = select.options[index];
    if (location.hash === `#${value}`) targets[index].scrollIntoView();
    else location.hash = value;
    tell(index);
  }

  function step(by) {
    const whole = wholes.filter((i) => i <= select.selectedIndex).length - 1;
    go(wholes[Math.max(0, Math.min(wholes.length - 1, whole + by))]);
  }

  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting || Date.now() < quiet) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; tell(shown()); });
  }, { passive: true });
  select.addEventListener("change", () => go(select.selectedIndex));
  steps.previous.addEventListener("click", () => step(-1));
  steps.next.addEventListener("click", () => step(1));
  tell(shown());
})();
