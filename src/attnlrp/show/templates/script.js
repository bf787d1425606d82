(() => {
  "use strict";
  const root = document.getElementById("{{ id }}");
  if (!root) return;
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const cells = [...root.querySelectorAll(".tokens span")];
  const buttons = [...root.querySelectorAll(".outputs button")];
  const readout = root.querySelector(".readout");
  readout.textContent = "Point at a token, or move between tokens with the arrow keys, to read its value.";

  // Show target k: its panels, and its relevance on the input.
  const choose = (k) => {
    const values = data.values[k].split(" ");
    const levels = data.levels[k].split(" ");
    cells.forEach((cell, i) => {
      cell.dataset.l = levels[i];
      cell.title = `${values[i]} ${data.units[k]}`;
      cell.toggleAttribute("aria-current", i === data.positions[k]);
    });
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === k)));
    for (const panel of root.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== String(k);
  };
  buttons.forEach((button, k) => {
    button.disabled = false;
    button.addEventListener("click", () => choose(k));
  });

  const read = (event) => {
    const i = cells.indexOf(event.target);
    if (i >= 0) readout.textContent = `${cells[i].title}   token ${i}   ${cells[i].textContent.trim()}`;
  };
  root.addEventListener("pointerover", read);
  root.addEventListener("focusin", read);

  // One tab stop for all tokens; the arrow keys move inside.
  cells.forEach((cell, i) => { cell.tabIndex = i ? -1 : 0; });
  root.addEventListener("keydown", (event) => {
    const i = cells.indexOf(event.target);
    const to = ({ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: cells.length - 1})[event.key];
    if (i < 0 || !cells[to]) return;
    event.preventDefault();
    event.stopPropagation();
    cells[i].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  });
{% if inside %}
{% include "inside.js" %}
{% endif %}
})();
