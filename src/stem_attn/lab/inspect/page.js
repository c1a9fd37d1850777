"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const page = JSON.parse(get("data").textContent);
  const { layers, heads, rows, columns, methods, steps } = page;
  const two = methods.length === 2;

  // Where each row's blocks begin: rows hold the columns 0 to their own.
  const offsets = [];
  let cells = 0;
  for (const row of rows) {
    offsets.push(cells);
    cells += row + 1;
  }
  const view = {
    layer: layers.indexOf(page.start[0]), head: page.start[1], measure: "blocks", method: 0,
    row: rows.length - 1, column: 0,
  };
  let shown = null; // the unpacked layer that is on the screen

  // --- data ---------------------------------------------------------------------------------------------------------

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const cache = new Map();
  function load(place) {
    if (!cache.has(place)) cache.set(place, inflate(get(`layer-${place}`).textContent).then(layerOf));
    return cache.get(place);
  }

  /** See pack_layer for the order of the bytes. */
  function layerOf(bytes) {
    const massBytes = Math.ceil((heads * cells) / 2);
    const bitBytes = Math.ceil((heads * cells) / 8);
    const lostAt = massBytes + methods.length * bitBytes;
    const index = (head, r, column) => head * cells + offsets[r] + column;
    return {
      mass(head, r, column) {
        const i = index(head, r, column);
        return (bytes[i >> 1] >> (4 * (i & 1))) & 15;
      },
      kept(method, head, r, column) {
        const i = index(head, r, column);
        return (bytes[massBytes + method * bitBytes + (i >> 3)] >> (i & 7)) & 1;
      },
      lost: (method, head, r) => bytes[lostAt + (method * heads + head) * rows.length + r] / 255,
      count(method, head, r) {
        let n = 0;
        for (let column = 0; column <= rows[r]; column++) n += this.kept(method, head, r, column);
        return n;
      },
    };
  }

  // --- colours ------------------------------------------------------------------------------------------------------

  let colors = {};
  function readColors() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "panel", "ink", "soft", "line", "kept", "pruned", "third", "focus"]) {
      const text = style.getPropertyValue(`--${name}`).trim();
      colors[name] = [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
    }
  }
  const css = (name) => `rgb(${colors[name].join(",")})`;
  const mix = (from, to, share) => from.map((part, i) => part + share * (to[i] - part));

  const FAINTEST = 0.2; // as in plots.py: a kept block without attention is still seen to be kept
  function blockColor(kept, strength) {
    const own = mix(colors.pruned, colors.kept, kept);
    return mix(colors.paper, own, Math.max(strength, kept * FAINTEST));
  }
  function differenceColor(first, second, strength) {
    if (first === second) return mix(colors.paper, colors.third, first ? 0.15 + 0.35 * strength : 0);
    return mix(colors.paper, first ? colors.kept : colors.pruned, 0.35 + 0.65 * strength);
  }

  function paint(width, height, colorAt) {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    let at = 0;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at += 4) {
        const color = colorAt(x, y);
        if (!color) continue;
        image.data[at] = color[0];
        image.data[at + 1] = color[1];
        image.data[at + 2] = color[2];
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function prepared(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    return context;
  }

  // --- all heads ----------------------------------------------------------------------------------------------------

  const MARGIN = 26;
  const tile = Math.max(18, Math.min(48, Math.floor(1000 / heads)));
  const [high, wide] = page.thumbnails.size;
  let small = null;
  const pictures = new Map(); // a thumbnail picture a method, until the colours change

  function thumbnails(method) {
    if (!pictures.has(method)) {
      const plane = layers.length * heads * high * wide;
      pictures.set(method, paint(heads * wide, layers.length * high, (x, y) => {
        const head = Math.floor(x / wide), layer = Math.floor(y / high), r = y % high, column = x % wide;
        const i = ((layer * heads + head) * high + r) * wide + column;
        const lastColumn = (rows[Math.min(rows.length - 1, Math.ceil(((r + 1) * rows.length) / high) - 1)] * wide) / columns;
        return column > lastColumn ? null : blockColor(small[plane * (1 + method) + i] / 255, small[i] / steps);
      }));
    }
    return pictures.get(method);
  }

  function measured(layer, head) {
    if (view.measure === "lost difference") return page.lost[0][layer][head] - page.lost[1][layer][head];
    return page[view.measure][view.method][layer][head];
  }

  function drawHeads() {
    if (!small) return;
    const canvas = get("heads");
    const width = MARGIN + heads * tile, height = MARGIN + layers.length * tile;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = prepared(canvas, width, height);
    context.fillStyle = css("soft");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    const every = Math.ceil(24 / tile);
    for (let head = 0; head < heads; head += every) context.fillText(head, MARGIN + (head + 0.5) * tile, 16);
    context.textAlign = "right";
    for (let l = 0; l < layers.length; l++) context.fillText(layers[l], MARGIN - 5, MARGIN + (l + 0.5) * tile + 4);
    let most = 1e-9;
    if (view.measure !== "blocks") {
      for (let l = 0; l < layers.length; l++) for (let h = 0; h < heads; h++) most = Math.max(most, Math.abs(measured(l, h)));
    }
    const inner = tile - 2;
    for (let l = 0; l < layers.length; l++) {
      for (let h = 0; h < heads; h++) {
        const x = MARGIN + h * tile, y = MARGIN + l * tile;
        context.fillStyle = css("panel");
        if (view.measure !== "blocks") {
          const value = measured(l, h);
          const color = view.measure === "density" || value < 0 ? colors.kept : colors.pruned;
          context.fillStyle = `rgb(${mix(colors.panel, color, Math.abs(value) / most).join(",")})`;
        }
        context.fillRect(x, y, inner, inner);
        if (view.measure === "blocks") {
          context.drawImage(thumbnails(view.method), h * wide, l * high, wide, high, x, y, inner, inner);
        }
      }
    }
    context.strokeStyle = css("focus");
    context.lineWidth = 3;
    context.strokeRect(MARGIN + view.head * tile - 1.5, MARGIN + view.layer * tile - 1.5, tile + 1, tile + 1);
    const scroller = canvas.parentElement, x = view.head * tile, y = view.layer * tile;
    const reach = MARGIN + 2 * tile; // the chosen head and its neighbours stay in sight
    if (y < scroller.scrollTop || y + reach > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = y - scroller.clientHeight / 2;
    if (x < scroller.scrollLeft || x + reach > scroller.scrollLeft + scroller.clientWidth) scroller.scrollLeft = x - scroller.clientWidth / 2;
    const percent = (value) => `${(100 * value).toFixed(1)}%`;
    const told = methods.map((name, m) =>
      `${name} keeps ${percent(page.density[m][view.layer][view.head])} of the blocks and loses ` +
      `${percent(page.lost[m][view.layer][view.head])} of the attention`);
    get("picked").textContent = `Layer ${layers[view.layer]}, head ${view.head}: ${told.join("; ")}.`;
  }

  // --- one head -----------------------------------------------------------------------------------------------------

  const maps = methods.map((name, m) => ({ name, color: (r, c) => {
    return blockColor(shown.kept(m, view.head, r, c), shown.mass(view.head, r, c) / steps);
  } }));
  if (two) {
    maps.push({
      name: `Difference. Blue: only ${methods[0]} keeps it, orange: only ${methods[1]}, grey: both`,
      color: (r, c) => differenceColor(
        shown.kept(0, view.head, r, c), shown.kept(1, view.head, r, c), shown.mass(view.head, r, c) / steps),
    });
  }
  for (const map of maps) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = map.name;
    map.canvas = document.createElement("canvas");
    map.canvas.tabIndex = 0;
    map.canvas.setAttribute("role", "img");
    map.canvas.setAttribute("aria-label", `${map.name}: blocks of one head; arrow keys move the mark`);
    map.canvas.className = "map";
    figure.append(caption, map.canvas);
    get("maps").append(figure);
    const point = (event) => {
      const box = map.canvas.getBoundingClientRect();
      const r = Math.floor(((event.clientY - box.top) / box.height) * rows.length);
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      if (r >= 0 && r < rows.length && column >= 0 && column <= rows[r]) mark(r, column);
    };
    map.canvas.addEventListener("pointermove", point);
    map.canvas.addEventListener("pointerdown", point);
    map.canvas.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 8 : 1;
      const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      mark(view.row + move[0], view.column + move[1]);
    });
  }

  function mark(r, column) {
    view.row = Math.max(0, Math.min(rows.length - 1, r));
    view.column = Math.max(0, Math.min(rows[view.row], column));
    drawMarks();
    tell();
  }

  /** The pruned block with the most attention: what a reader wants to see first. */
  function worstBlock() {
    let worst = [rows.length - 1, 0], most = -1;
    rows.forEach((row, r) => {
      for (let column = 0; column <= row; column++) {
        const step = shown.mass(view.head, r, column);
        if (step > most && !shown.kept(0, view.head, r, column)) [worst, most] = [[r, column], step];
      }
    });
    return worst;
  }

  function drawMaps() {
    for (const map of maps) {
      map.picture = paint(columns, rows.length, (c, r) => (c > rows[r] ? null : map.color(r, c)));
    }
    drawMarks();
  }

  function drawMarks() {
    for (const map of maps) {
      if (!map.picture) continue;
      const size = map.canvas.clientWidth;
      const context = prepared(map.canvas, size, size);
      context.drawImage(map.picture, 0, 0, size, size);
      const w = size / columns, h = size / rows.length;
      context.strokeStyle = css("focus");
      context.lineWidth = 2;
      context.strokeRect(view.column * w - 1, view.row * h - 1, w + 2, h + 2);
    }
  }

  function line(tag, text) {
    const element = document.createElement(tag);
    element.textContent = text;
    return element;
  }

  function share(step) {
    if (step === 0) return `Less than ${(100 * page.leastMass).toFixed(2)}%`;
    return `About ${Number((100 * page.leastMass ** (1 - step / steps)).toPrecision(2))}%`;
  }

  function tell() {
    const query = rows[view.row], key = view.column;
    const step = shown.mass(view.head, view.row, key);
    const kept = methods.map((name, m) => `${name}: ${shown.kept(m, view.head, view.row, key) ? "kept" : "pruned"}`);
    const tokens = (block) => `${block * page.blockSize} to ${Math.min((block + 1) * page.blockSize, page.tokens) - 1}`;
    get("cell").replaceChildren(
      line("strong", `${share(step)} of the attention of query block ${query} falls on key block ${key}. ${kept.join(", ")}.`),
      line("div", `Query block ${query}, tokens ${tokens(query)}:`), line("q", page.texts[query].slice(0, 400)),
      line("div", `Key block ${key}, tokens ${tokens(key)}:`), line("q", page.texts[key].slice(0, 400)),
    );
  }

  // --- charts -------------------------------------------------------------------------------------------------------

  function chart(svg, series, label) {
    const width = Math.max(240, svg.clientWidth), height = 176, left = 46, bottom = 20, top = 10, right = 8;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const most = Math.max(1e-9, ...series.flatMap((one) => one.values));
    const x = (r) => left + ((width - left - right) * (rows[r] + 1)) / columns;
    const y = (value) => height - bottom - ((height - bottom - top) * value) / most;
    const make = (tag, attributes, text = "") => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      element.textContent = text;
      return element;
    };
    svg.replaceChildren(
      make("path", { d: `M${left} ${top}V${height - bottom}H${width - right}`, fill: "none", stroke: css("line") }),
      make("text", { x: left - 5, y: top + 8, "text-anchor": "end" }, label(most)),
      make("text", { x: left - 5, y: height - bottom, "text-anchor": "end" }, label(0)),
      make("text", { x: width - right, y: height - 5, "text-anchor": "end" }, `token ${page.tokens}`),
      ...series.map((one) => make("polyline", {
        points: one.values.map((value, r) => `${x(r)},${y(value)}`).join(" "),
        stroke: css(one.color), "stroke-dasharray": one.dash || "",
      })),
      ...series.filter((one) => one.name).map((one, i) =>
        make("text", { x: left + 10, y: top + 12 + 14 * i, style: `fill:${css(one.color)}` }, one.name)),
    );
  }

  function drawCharts() {
    const all = rows.map((_, r) => r);
    const own = ["kept", "pruned"];
    const named = (name, m) => ({ name: two ? name : "", color: own[m], dash: m ? "7 3" : "" });
    chart(get("kept-chart"), [
      ...methods.map((name, m) => ({ ...named(name, m), values: all.map((r) => shown.count(m, view.head, r)) })),
      { color: "third", dash: "2 4", values: rows.map((row) => row + 1) },
    ], (value) => Math.round(value));
    chart(get("lost-chart"), methods.map((name, m) => ({
      ...named(name, m), color: two ? own[m] : "pruned", values: all.map((r) => shown.lost(m, view.head, r)),
    })), (value) => `${(100 * value).toFixed(value && value < 0.1 ? 1 : 0)}%`);
  }

  // --- choosing -----------------------------------------------------------------------------------------------------

  async function choose(layer, head) {
    view.layer = Math.max(0, Math.min(layers.length - 1, layer));
    view.head = Math.max(0, Math.min(heads - 1, head));
    get("layer").value = view.layer;
    get("head").value = view.head;
    drawHeads();
    const wanted = view.layer;
    const loaded = await load(wanted);
    if (wanted !== view.layer) return; // another one was chosen meanwhile
    const first = !shown;
    shown = loaded;
    if (first) [view.row, view.column] = worstBlock();
    drawMaps();
    drawCharts();
    tell();
    document.body.dataset.shown = `${layers[view.layer]}/${view.head}`;
  }

  layers.forEach((layer, place) => get("layer").append(new Option(layer, place)));
  for (let head = 0; head < heads; head++) get("head").append(new Option(head, head));
  get("layer").addEventListener("change", (event) => choose(Number(event.target.value), view.head));
  get("head").addEventListener("change", (event) => choose(view.layer, Number(event.target.value)));
  get("measure").addEventListener("change", (event) => {
    view.measure = event.target.value;
    drawHeads();
  });
  if (two) {
    get("method").addEventListener("change", (event) => {
      view.method = Number(event.target.value);
      drawHeads();
    });
  }
  get("heads").addEventListener("click", (event) => {
    const head = Math.floor((event.offsetX - MARGIN) / tile), layer = Math.floor((event.offsetY - MARGIN) / tile);
    if (head >= 0 && head < heads && layer >= 0 && layer < layers.length) choose(layer, head);
  });
  get("heads").addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(view.layer + move[0], view.head + move[1]);
  });

  function redraw() {
    readColors();
    pictures.clear();
    drawHeads();
    if (shown) {
      drawMaps();
      drawCharts();
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("resize", () => {
    drawMarks();
    if (shown) drawCharts();
  });

  readColors();
  inflate(page.thumbnails.data).then((bytes) => {
    small = bytes;
    return choose(view.layer, view.head);
  }).then(() => {
    document.body.dataset.ready = String(Math.round(performance.now()));
  });
})();
