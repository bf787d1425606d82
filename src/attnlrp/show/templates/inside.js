
  // --- inside the model: data is unpacked and drawn when a section is opened -----------------------------------------
  const stores = {};
  const store = (k) => (stores[k] ??= JSON.parse(root.querySelector(`[data-inside="${k}"]`).textContent));
  const make = (tag, name, words) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (words !== undefined) element.textContent = words;
    return element;
  };

  // Whole numbers of the page as relevance; `digits` are the decimals that a step of each row leaves.
  const unpack = (entry) => (entry.ready ??= (async () => {
    const bytes = Uint8Array.from(atob(entry.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    const whole = new Int16Array(buffer);
    const size = whole.length / entry.scale.length;
    return entry.scale.map((step, r) => ({
      values: Float64Array.from(whole.subarray(r * size, (r + 1) * size), (v) => v * step),
      digits: step ? Math.min(20, Math.max(0, Math.ceil(-Math.log10(step)))) : 0,
    }));
  })());
  const signed = (value, digits) => {
    const shown = value.toFixed(digits);
    return Number(shown) ? (value > 0 ? "+" : "") + shown : "0";
  };
  const largest = (values) => values.reduce((end, v) => Math.max(end, Math.abs(v)), 0);
  // Where the colours of a map end: a few cells outshine all others.
  const endOf = (values) => {
    const sizes = values.map(Math.abs).filter((size) => size > 0).sort();
    return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.95 * sizes.length))] : 0;
  };
  const level = (value, end) => (end ? Math.round(20 * Math.max(-1, Math.min(1, value / end))) : 0);
  const tokenAt = (start, i) => (start === null || !cells[start + i] ? "" : cells[start + i].textContent.trim() || "␣");
  const placeAt = (start, i) => (start === null ? `position ${i}` : `token ${start + i}   ${tokenAt(start, i)}`);

  // The colours of all levels in the theme that is on.
  const palette = () => {
    const probe = make("div", "tokens");
    probe.hidden = true;
    const spans = Array.from({length: 41}, (_, i) => {
      const span = make("span");
      span.dataset.l = i - 20;
      probe.append(span);
      return span;
    });
    root.append(probe);
    const colours = spans.map((span) => getComputedStyle(span).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number));
    probe.remove();
    return colours;
  };

  // A picture with one cell for each of rows x columns; `told(row, column)` is said of the cell that is pointed at.
  const grid = (rows, columns, leveled, rowNames, columnNames, told) => {
    const width = Math.max(3, Math.min(28, Math.floor(640 / columns)));
    const height = Math.max(3, Math.min(16, Math.floor(560 / rows)));
    const box = make("div", "map");
    const left = make("div", "rows");
    const canvas = make("canvas");
    canvas.width = columns;
    canvas.height = rows;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Map; the arrow keys read it cell by cell");
    canvas.style.width = `${columns * width}px`;
    canvas.style.height = `${rows * height}px`;
    left.style.height = canvas.style.height;
    for (let r = 0, free = 0; r < rows; r++) {
      const shown = rowNames(r);
      if (shown === "" || r * height < free) continue;
      const name = make("span", "", shown);
      name.style.top = `${(r + 0.5) * height}px`;
      left.append(name);
      free = r * height + 13;
    }
    left.style.width = `${Math.min(24, Math.max(0, ...Array.from(left.children, (c) => c.textContent.length)) + 1)}ch`;
    const paint = () => {
      const colours = palette();
      const picture = new ImageData(columns, rows);
      for (let i = 0; i < rows * columns; i++) {
        picture.data.set(colours[leveled(Math.floor(i / columns), i % columns) + 20], 4 * i);
        picture.data[4 * i + 3] = 255;
      }
      canvas.getContext("2d").putImageData(picture, 0, 0);
    };
    let at = [0, 0];
    const say = (row, column) => {
      at = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
      readout.textContent = canvas.title = told(...at);
    };
    canvas.addEventListener("pointermove", (event) => say(Math.floor(event.offsetY / height), Math.floor(event.offsetX / width)));
    canvas.addEventListener("keydown", (event) => {
      const by = ({ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]})[event.key];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      say(at[0] + by[0], at[1] + by[1]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    box.append(left, canvas);
    if (width >= 14) {
      const feet = make("div", "columns");
      for (let c = 0; c < columns; c++) {
        const name = make("span", "", columnNames(c));
        name.style.width = `${width}px`;
        feet.append(name);
      }
      box.append(feet);
    }
    paint();
    return box;
  };

  const drawers = {
    async map(target, index) {
      const {names, start, end, values} = store(target).maps[index];
      const rows = await unpack(values);
      const last = rows.length - 1;
      return grid(
        rows.length, rows[0].values.length,
        (r, c) => level(rows[last - r].values[c], end),
        (r) => (names[last - r].endsWith(":after") ? names[last - r].slice(0, -":after".length) : ""), (c) => tokenAt(start, c) || c,
        (r, c) => `${signed(rows[last - r].values[c], rows[last - r].digits)} ${data.units[target]}   ${names[last - r]}   ${placeAt(start, c)}`,
      );
    },
    table(target, index) {
      const table = make("table");
      const head = table.createTHead().insertRow();
      const labelled = store(target).layers[index].rows.some((row) => row[5]);
      for (const name of ["Unit", "Relevance", "Share", "Strongest at", "Activation", labelled ? "Label" : ""]) {
        const cell = make("th", "", name);
        cell.scope = "col";
        head.append(cell);
      }
      const body = table.createTBody();
      store(target).layers[index].rows.forEach((row, r) => {
        const line = body.insertRow();
        const unit = make("th");
        unit.scope = "row";
        const button = make("button", "", row[0]);
        button.type = "button";
        Object.assign(button.dataset, {target, layer: index, row: r});
        button.setAttribute("aria-expanded", "false");
        unit.append(button);
        line.append(unit, ...row.slice(1).map((words) => {
          const cell = make("td");
          cell.append(make("bdi", "", words));
          return cell;
        }));
      });
      return table;
    },
    async heads(target, index, best) {
      const {start, keys, sums, maps} = store(target).layers[index];
      const heads = await unpack(maps);
      const [, queries, columns] = maps.shape;
      const box = make("div");
      const choice = make("div", "outputs");
      const place = make("div");
      const draw = (h) => {
        [...choice.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === h)));
        const {values, digits} = heads[h];
        const end = endOf(values);
        const legend = make("p", "legend", signed(-end, digits));
        legend.append(make("i"), signed(end, digits), make("span", "", `relevance in ${data.units[target]}, in all ${sums[h]}; stronger cells have the colour of the ends`));
        place.replaceChildren(grid(
          queries, columns,
          (q, c) => level(values[q * columns + c], end),
          (q) => tokenAt(start, q) || q, (c) => tokenAt(keys, c) || c,
          (q, c) => `${signed(values[q * columns + c], digits)} ${data.units[target]}   ${placeAt(start, q)}   reads   ${placeAt(keys, c)}`,
        ), legend);
      };
      heads.forEach((_, h) => {
        const button = make("button", "", h);
        button.type = "button";
        button.title = `head ${h}, relevance ${sums[h]}`;
        button.addEventListener("click", () => draw(h));
        choice.append(button);
      });
      box.append(choice, place);
      draw(best);
      return box;
    },
  };
  root.addEventListener("toggle", async (event) => {
    const {draw, target, index, best} = event.target.dataset;
    const place = event.target.querySelector(":scope > .drawn");
    if (!draw || !event.target.open || place.childElementCount || place.dataset.busy) return;
    place.dataset.busy = "true";
    place.append(await drawers[draw](Number(target), Number(index), Number(best)));
  }, true);

  // A unit that is chosen shows its relevance on the text, in a row of its own.
  const strip = async (target, layer, row) => {
    const {start, values} = store(target).layers[layer];
    const {values: own, digits} = (await unpack(values))[row];
    const end = largest(own);
    const box = make("div", "tokens");
    own.forEach((value, i) => {
      const span = make("span", "", start === null ? `${i} ` : cells[start + i].textContent);
      span.dataset.l = level(value, end);
      span.dataset.place = placeAt(start, i);
      span.title = `${signed(value, digits)} ${data.units[target]}`;
      box.append(span);
    });
    return box;
  };
  for (const button of root.querySelectorAll("button[data-row]")) button.disabled = false;
  root.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-row]");
    if (!button) return;
    const line = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) return line.nextElementSibling?.matches(".strip") && line.nextElementSibling.remove();
    const {target, layer, row} = button.dataset;
    const below = make("tr", "strip");
    const cell = below.insertCell();
    cell.colSpan = line.cells.length;
    line.after(below);
    cell.append(await strip(target, layer, Number(row)));
  });
  root.addEventListener("pointerover", (event) => {
    const {place} = event.target.dataset;
    if (place) readout.textContent = `${event.target.title}   ${place}`;
  });
