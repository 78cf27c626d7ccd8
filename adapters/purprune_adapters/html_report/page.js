"use strict";

// Tables are sorted by the numbers in data-value, or by their words.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
      const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      const numbers = (a, b) => Number(key(a)) - Number(key(b));
      const body = table.tBodies[0];
      const rows = [...body.rows];
      rows.sort(rows.every((row) => !Number.isNaN(Number(key(row)))) ? numbers : order);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}

// One layer is shown at a time; without this script all are.
const looks = [...document.querySelectorAll(".look")];
const choose = document.getElementById("choose");
function show(id) {
  const found = looks.some((look) => look.id === id) ? id : looks[0]?.id;
  looks.forEach((look) => { look.hidden = look.id !== found; });
  if (choose) choose.value = found;
}
if (choose) {
  choose.closest("p").hidden = false;
  choose.addEventListener("change", () => show(choose.value));
  addEventListener("hashchange", () => show(location.hash.slice(1)));
  show(location.hash.slice(1));
}

// A mask is zoomed by buttons, keys, pinching or Ctrl and the wheel, and moved by dragging.
for (const frame of document.querySelectorAll(".mask")) {
  const image = frame.querySelector("img");
  const tools = frame.parentElement.querySelector(".tools");
  const output = tools.querySelector("output");
  const { rows, columns } = frame.dataset;
  const largest = Math.max(8, Math.min(Math.max(rows, columns) / 8, 512));
  let scale = 1, x = 0, y = 0; // x and y: the corner that is seen, as a share of the picture

  const span = (start, size) => {
    const first = Math.floor(start * size) + 1;
    return `${first.toLocaleString("en")}–${Math.min(Math.ceil((start + 1 / scale) * size), size).toLocaleString("en")}`;
  };
  const draw = () => {
    x = Math.min(Math.max(x, 0), 1 - 1 / scale);
    y = Math.min(Math.max(y, 0), 1 - 1 / scale);
    image.style.transform = `scale(${scale}) translate(${-100 * x}%, ${-100 * y}%)`;
    frame.classList.toggle("near", scale > 1);
    output.textContent = `rows ${span(y, Number(rows))}, columns ${span(x, Number(columns))}`;
  };
  const zoom = (factor, atX = 0.5, atY = 0.5) => {
    const next = factor ? Math.min(Math.max(scale * factor, 1), largest) : 1;
    x += atX / scale - atX / next;
    y += atY / scale - atY / next;
    scale = next;
    draw();
  };
  tools.hidden = false;
  for (const button of tools.querySelectorAll("button")) {
    button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
  }
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = frame.getBoundingClientRect();
    zoom(2 ** (-event.deltaY / 120), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  frame.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const zooms = { "+": 2, "=": 2, "-": 0.5, 0: 0 };
    if (event.key in zooms) zoom(zooms[event.key]);
    else if (event.key in moves && scale > 1) {
      x += moves[event.key][0] / (8 * scale);
      y += moves[event.key][1] / (8 * scale);
      draw();
    } else return;
    event.preventDefault();
  });
  frame.addEventListener("pointerdown", (event) => {
    if (scale === 1) return;
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    if (!frame.hasPointerCapture(event.pointerId)) return;
    x -= event.movementX / (frame.clientWidth * scale);
    y -= event.movementY / (frame.clientHeight * scale);
    draw();
  });
  draw();
}
