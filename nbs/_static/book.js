// Wide formulas and tables: smaller first, then a frame that scrolls and says so. Figures lead to themselves, and a
// figure with states gets a slider. Without this script all of them stand still; nothing here loads anything.
(function () {
  "use strict";
  const SMALLEST_FORMULA = 0.6;

  function frame(element, label, framed) {
    element.classList.add("scrolls");
    element.classList.toggle("framed", framed);
    element.tabIndex = 0;
    element.setAttribute("role", "region");
    element.setAttribute("aria-label", label + ": scrolls sideways");
  }

  function unframe(element) {
    if (!element.classList.contains("scrolls")) return;
    element.classList.remove("scrolls", "framed");
    for (const name of ["tabindex", "role", "aria-label"]) element.removeAttribute(name);
  }

  // The width that a formula may take: its own column's, or that of the paragraph it stands in.
  function roomFor(formula) {
    if (formula.hasAttribute("display")) return formula.clientWidth;
    let block = formula.parentElement;
    while (getComputedStyle(block).display.startsWith("inline")) block = block.parentElement;
    const style = getComputedStyle(block);
    return block.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  }

  function fitFormula(formula) {
    formula.dataset.size ??= formula.style.fontSize || "100%"; // what MathJax chose
    formula.style.fontSize = formula.dataset.size;
    unframe(formula);
    const inside = formula.querySelector("mjx-math");
    const scale = roomFor(formula) / inside.getBoundingClientRect().width;
    if (scale >= 1) return;
    const size = parseFloat(getComputedStyle(formula).fontSize);
    formula.style.fontSize = size * Math.max(SMALLEST_FORMULA, 0.98 * scale) + "px";
    if (0.98 * scale < SMALLEST_FORMULA) frame(formula, "Formula", false);
  }

  function fitTable(table) {
    const box = table.parentElement;
    table.classList.remove("fit-1", "fit-2");
    unframe(box);
    for (const step of ["fit-1", "fit-2"]) {
      if (table.scrollWidth <= box.clientWidth + 1 && table.offsetWidth <= box.clientWidth + 1) return;
      table.classList.remove("fit-1");
      table.classList.add(step);
    }
    if (table.offsetWidth > box.clientWidth + 1) frame(box, "Table", true);
  }

  function ownBox(table) {
    if (table.parentElement.children.length === 1) return;
    const box = document.createElement("div");
    table.replaceWith(box);
    box.append(table);
  }

  // A figure leads to itself: on a small screen its labels are too small within the column.
  function ownPage(image) {
    if (image.closest("a")) return;
    const link = document.createElement("a");
    link.href = image.src;
    link.title = "Open the figure alone";
    image.replaceWith(link);
    link.append(image);
  }

  // A figure with `data-live`, a list of states {x, y: […], text}: a slider moves its marks and its words.
  function enliven(figure) {
    const states = JSON.parse(figure.dataset.live);
    const slider = document.createElement("input");
    const words = document.createElement("output");
    Object.assign(slider, { type: "range", min: 0, max: states.length - 1, value: figure.dataset.start });
    slider.setAttribute("aria-label", figure.dataset.label);
    function show() {
      const state = states[slider.value];
      figure.querySelector(".at").setAttribute("transform", "translate(" + state.x + ",0)");
      figure.querySelectorAll(".at circle").forEach((dot, i) => dot.setAttribute("cy", state.y[i]));
      slider.setAttribute("aria-valuetext", state.text);
      words.textContent = state.text;
    }
    figure.querySelector("svg").after(slider, words);
    slider.addEventListener("input", show);
    show();
  }

  function fitAll() {
    document.querySelectorAll("article table").forEach(fitTable);
    document.querySelectorAll("article mjx-container").forEach(fitFormula);
  }

  function start() {
    document.querySelectorAll("article figure[data-live]").forEach(enliven);
    document.querySelectorAll("article table").forEach(ownBox);
    document.querySelectorAll("article figure img").forEach(ownPage);
    fitAll();
    const mathjax = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
    if (mathjax) mathjax.then(fitAll);
    let waiting;
    window.addEventListener("resize", function () {
      clearTimeout(waiting);
      waiting = setTimeout(fitAll, 100);
    });
    document.addEventListener("toggle", fitAll, true);
  }

  if (document.readyState === "complete") start();
  else window.addEventListener("load", start);
})();
