"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const cards = find("cards");
  if (!cards) return;
  const all = [...cards.children];
  const words = new Map(all.map((card) => [card, card.querySelector(".sentences").textContent.toLowerCase()]));
  const STEP = 12;
  let limit = STEP;
  let matching = all;

  // filter, sort, search

  const change = (card, i) => {
    const text = card.dataset.changes.split(",")[i];
    return text ? Number(text) : NaN;
  };
  const key = {
    short: () => (card) => Number(card.dataset.words),
    long: () => (card) => -card.dataset.words,
    gain: (i) => (card) => -change(card, i),
    loss: (i) => (card) => change(card, i),
  };

  function update() {
    const needle = find("search").value.trim().toLowerCase();
    const length = find("length")?.value;
    const [order, index] = find("sort").value.split("-");
    matching = all.filter((card) => words.get(card).includes(needle) && (!length || card.dataset.length === length));
    if (order) {
      const value = key[order](index);
      const rank = (card) => (Number.isNaN(value(card)) ? Infinity : value(card)); // unknown values last
      matching.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b)));
    }
    cards.append(...matching);
    const shown = new Set(matching.slice(0, limit));
    for (const card of all) card.hidden = !shown.has(card);
    find("count").textContent = `${shown.size} of ${matching.length} prompts`;
    find("more").hidden = limit >= matching.length;
  }

  const tools = document.querySelector(".tools");
  tools.hidden = false;
  tools.addEventListener("submit", (event) => event.preventDefault());
  const choose = (event) => {
    if (event.target.id === "colour") document.body.dataset.colour = event.target.value;
    else {
      limit = STEP;
      update();
    }
  };
  find("search").addEventListener("input", choose);
  tools.querySelectorAll("select").forEach((select) => select.addEventListener("change", choose));
  find("more").addEventListener("click", () => {
    limit += STEP;
    update();
  });
  update();
  addEventListener("beforeprint", () => all.forEach((card) => (card.hidden = !matching.includes(card))));
  addEventListener("afterprint", update);

  // one sentence in all images

  let lit = null;
  function light(row) {
    if (row === lit) return;
    mark(lit, false);
    lit = row;
    mark(lit, true);
  }
  function mark(row, on) {
    if (!row) return;
    row.classList.toggle("lit", on);
    const names = (row.dataset.facts ?? "").split(" | ");
    const figures = row.closest("table").parentElement.querySelectorAll("figure");
    figures.forEach((figure, i) => {
      const chip = row.cells[i + 1]?.querySelector(".chip");
      figure.className = on && chip ? chip.className.replace("chip", "lit") : "";
      const facts = [...(chip?.dataset.facts ?? "")].map((digit, j) => `${digit === "1" ? "✓" : "✗"} ${names[j]}`);
      const score = chip?.querySelector("small")?.textContent;
      const note = chip?.classList.contains("truncated") ? "truncated" : "";
      figure.querySelector(".now").textContent = on ? [...facts, score, note].filter(Boolean).join(", ") : "";
    });
  }
  const rowOf = (event) => event.target.closest?.(".sentences tbody tr");
  document.addEventListener("mouseover", (event) => light(rowOf(event)));
  document.addEventListener("focusin", (event) => light(rowOf(event)));

  // large images

  const dialog = find("large");
  const stage = find("stage");
  let current = 0;
  let single = -1; // the only model shown, or -1
  function show(i) {
    current = Math.max(0, Math.min(matching.length - 1, i));
    light(null);
    const copy = matching[current].cloneNode(true);
    copy.hidden = false;
    stage.replaceChildren(copy);
    flip(single);
    dialog.scrollTop = 0;
  }
  function flip(model) {
    const figures = [...stage.querySelectorAll("figure")];
    single = model >= figures.length ? -1 : model < -1 ? figures.length - 1 : model;
    figures.forEach((figure, i) => (figure.hidden = single !== -1 && single !== i));
    stage.classList.toggle("single", single !== -1);
    // with one image, its colours are those of the sentences
    for (const row of stage.querySelectorAll(".sentences tbody tr")) {
      const chip = single === -1 ? null : row.cells[single + 1]?.querySelector(".chip");
      row.cells[0].className = chip?.className ?? "";
    }
  }
  cards.addEventListener("click", (event) => {
    const figure = event.target.closest(".open")?.parentElement;
    if (!figure) return;
    single = -1;
    show(matching.indexOf(figure.closest(".example")));
    dialog.showModal();
  });
  stage.addEventListener("click", (event) => {
    const figure = event.target.closest(".open")?.parentElement;
    if (figure) flip(single === -1 ? Number(figure.dataset.model) : -1);
  });
  find("previous").addEventListener("click", () => show(current - 1));
  find("next").addEventListener("click", () => show(current + 1));
  find("flip").addEventListener("click", () => flip(single + 1));
  find("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => matching[current]?.querySelector(".open").focus());

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select");
    if (event.key === "Escape" && event.target === find("search")) {
      find("search").value = "";
      update();
      find("search").blur();
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!dialog.open) {
      if (event.key === "/") {
        event.preventDefault();
        find("search").focus();
      }
      if (rowOf(event) && ["ArrowUp", "ArrowDown"].includes(event.key)) {
        const row = rowOf(event);
        const other = event.key === "ArrowUp" ? row.previousElementSibling : row.nextElementSibling;
        if (other) {
          event.preventDefault();
          other.focus();
        }
      }
      return;
    }
    const act = {
      ArrowLeft: () => show(current - 1),
      ArrowRight: () => show(current + 1),
      ArrowUp: () => flip(single - 1),
      ArrowDown: () => flip(single + 1),
    }[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
})();
