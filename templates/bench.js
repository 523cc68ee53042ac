"use strict";
const main = document.querySelector("main");
const facts = document.getElementById("facts");
let kept = null;

// Details of a bar

function tell(bar) {
  document.querySelectorAll(".bar.on").forEach((other) => other.classList.remove("on"));
  facts.hidden = !bar;
  if (!bar) return;
  bar.classList.add("on");
  const list = document.createElement("dl");
  for (const [name, value] of JSON.parse(bar.dataset.facts)) {
    list.append(Object.assign(document.createElement("dt"), { textContent: name }));
    list.append(Object.assign(document.createElement("dd"), { textContent: value }));
  }
  facts.replaceChildren(list);
  const box = bar.getBoundingClientRect();
  const below = box.bottom + facts.offsetHeight + 12 < innerHeight;
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - facts.offsetWidth - 8);
  facts.style.left = `${left + scrollX}px`;
  facts.style.top = `${scrollY + (below ? box.bottom + 6 : box.top - facts.offsetHeight - 6)}px`;
}

function keep(bar) {
  kept = kept === bar ? null : bar;
  tell(kept);
}

main.addEventListener("pointerover", (event) => {
  const bar = event.target.closest(".bar");
  if (bar) tell(bar);
});
main.addEventListener("pointerout", (event) => {
  if (event.target.closest(".bar")) tell(kept);
});
main.addEventListener("focusin", (event) => {
  const bar = event.target.closest(".bar");
  if (bar && bar.matches(":focus-visible")) tell(bar);
});
main.addEventListener("focusout", () => tell(kept));
addEventListener("resize", () => {
  tell(kept);
  relabel();
});

// One tab stop a run; the arrow keys go from bar to bar.

function stop(run) {
  const bars = [...run.querySelectorAll(".bar")];
  bars.forEach((bar, i) => { bar.tabIndex = i ? -1 : 0; });
}
document.querySelectorAll(".run").forEach(stop);

addEventListener("keydown", (event) => {
  if (event.key === "Escape") keep(kept);
  const bar = event.target.closest?.(".bar");
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!bar || !step) return;
  event.preventDefault();
  const bars = [...bar.closest(".run").querySelectorAll(".bar")];
  const next = bars[(bars.indexOf(bar) + step + bars.length) % bars.length];
  bar.tabIndex = -1;
  next.tabIndex = 0;
  next.focus({ focusVisible: true });
});

// Which runs are shown, on one scale

function rescale() {
  const shown = [...document.querySelectorAll(".run:not([hidden])")].filter((run) => run.offsetParent);
  const most = Math.max(...shown.map((run) => Number(run.dataset.seconds)), 0);
  if (!most) return;
  main.style.setProperty("--max", most);
  const power = 10 ** Math.floor(Math.log10(most / 8));
  const step = power * [1, 2, 5, 10].find((m) => most <= power * m * 8);
  const count = Math.floor(most / step + 1e-9);
  for (const axis of document.querySelectorAll(".axis")) {
    axis.replaceChildren(...Array.from({ length: count + 1 }, (_, i) => {
      const tick = document.createElement("i");
      tick.style.setProperty("--s", i * step);
      const text = `${Number((i * step).toPrecision(6))}${i === count ? " s" : ""}`;
      tick.append(Object.assign(document.createElement("b"), { textContent: text }));
      return tick;
    }));
  }
}

// The longest label that fits; the style sheet hides one that does not.

const pen = document.createElement("canvas").getContext("2d");

function relabel() {
  for (const bar of document.querySelectorAll(".run:not([hidden]) .bar:not(.moment)")) {
    const span = bar.querySelector("span");
    const style = getComputedStyle(bar);
    pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    span.dataset.full ??= span.textContent;
    const [, name, seconds] = span.dataset.full.match(/(.*) (\S+)/);
    const fits = (text) => pen.measureText(text).width + 10 < bar.clientWidth;
    span.textContent = [span.dataset.full, name, seconds].find(fits) ?? span.dataset.full;
  }
}

function press(chip, on) {
  chip.setAttribute("aria-pressed", on);
  document.getElementById(chip.getAttribute("aria-controls")).hidden = !on;
}

main.addEventListener("click", (event) => {
  const bar = event.target.closest(".bar");
  if (bar) return keep(bar);
  const chip = event.target.closest(".chip");
  const fold = event.target.closest(".fold");
  if (!chip && !fold) return;
  kept = null;
  tell(null);
  if (fold) {
    const open = fold.getAttribute("aria-expanded") !== "true";
    fold.setAttribute("aria-expanded", open);
    document.getElementById(fold.getAttribute("aria-controls")).hidden = !open;
  } else if (chip.classList.contains("all")) {
    const chips = [...chip.parentElement.querySelectorAll("[aria-controls]")];
    const on = chips.some((other) => other.getAttribute("aria-pressed") === "false");
    chips.forEach((other) => press(other, on));
  } else {
    press(chip, chip.getAttribute("aria-pressed") !== "true");
  }
  rescale();
  relabel();
});
relabel();
