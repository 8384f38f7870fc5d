/* A map of embeddings to move about in. The Python function tripletlib.explore packs this script
   with its data into one piece of HTML, so that it needs neither a network nor another library.

   root  the element that shows the map; what it holds (a still picture) is seen without scripts
   data  count, k            how many points there are, and neighbours of each
         points              x and y of each in 0 … 65535, upwards; base64 of uint16
         classes             [{name, color}]
         labels              the place of each point's class among these; base64 of uint16
         neighbours          count × k places among the points, nearest first; base64 of uint32
         space               in what the neighbours are near, in words
         sheet               all images in one picture, row by row; a data URI
         columns, pitch      of the sheet: images a row, pixels from one image to the next
         height, width       of an image, in pixels
         title, style        what the map is called; the text of explorer.css */
function explorer(root, data) {
  "use strict";
  if (root.shadowRoot) return;

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  const points = new Uint16Array(bytes(data.points));
  const labels = new Uint16Array(bytes(data.labels));
  const neighbours = new Uint32Array(bytes(data.neighbours));
  const { classes, count, k } = data;
  const spans = [0, 1].map((axis) => {
    const numbers = points.filter((_, at) => at % 2 === axis);
    return Math.max(1, numbers.reduce((a, b) => Math.max(a, b)) - numbers.reduce((a, b) => Math.min(a, b)));
  });
  const ZOOM = { least: 1, most: 60, step: 1.5 };
  const MARGIN = 24; // between the outermost points and the edge
  const REACH = 14; // how far from a point the mouse still finds it

  // ---- What is on the page ---------------------------------------------------------------------

  const make = (tag, properties = {}, ...children) => {
    const { role, label, ...others } = properties;
    const element = Object.assign(document.createElement(tag), others);
    if (role) element.setAttribute("role", role);
    if (label) element.setAttribute("aria-label", label);
    element.append(...children);
    return element;
  };
  const map = make("canvas", {
    role: "application",
    label: `${data.title}. Arrow keys go from image to image, plus and minus zoom, 0 shows all, Escape lets go.`,
    tabIndex: 0,
  });
  const zoomButtons = [
    make("button", { label: "Zoom in", title: "Zoom in", onclick: () => zoom(ZOOM.step) }, "+"),
    make("button", { label: "Zoom out", title: "Zoom out", onclick: () => zoom(1 / ZOOM.step) }, "−"),
    make("button", { onclick: () => showAll() }, "All"),
  ];
  zoomButtons[2].title = "Show the whole map";
  const what = make("p", { className: "what" });
  const image = make("canvas", { className: "image", role: "img" });
  const near = make("p");
  const list = make("ul", { className: "neighbours", label: `Nearest ${data.space}` });
  const status = make("div", { className: "status", role: "status" });
  const sizes = new Array(classes.length).fill(0);
  labels.forEach((label) => sizes[label]++);
  const classButtons = classes.map(({ name, color }, label) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = color;
    const button = make("button", { onclick: () => pick(label) }, swatch, `${name} (${sizes[label]})`);
    button.setAttribute("aria-pressed", "false");
    return button;
  });
  root.attachShadow({ mode: "open" }).append(
    make("style", {}, data.style),
    make(
      "div",
      { className: "parts" },
      make("div", { className: "map" }, map, make("div", { className: "zoom" }, ...zoomButtons)),
      make("div", { className: "panel" }, what, image, near, list),
    ),
    make("div", { className: "classes", role: "group", label: "Classes" }, ...classButtons),
    make(
      "p",
      { className: "hint" },
      "Point at an image, or click to keep it. Drag to move; zoom by the buttons, by Ctrl and the " +
        "wheel, or by the wheel after a click. Arrow keys go from image to image. " +
        "A class of the list stands out when picked.",
    ),
    status,
  );

  // ---- What is shown ---------------------------------------------------------------------------

  const picked = new Set(); // classes that stand out; all, where there is none
  let kept = -1; // the point that a click or a key has chosen
  let shown = -1; // that whose image and neighbours are seen
  let view = { x: 32768, y: 32768, zoom: 1 }; // what is in the middle, and how near
  let width = 0;
  let height = 0; // of the map, in pixels of the page

  const stands = (point) => picked.size === 0 || picked.has(labels[point]);
  const scale = () =>
    Math.min((width - 2 * MARGIN) / spans[0], (height - 2 * MARGIN) / spans[1]) * view.zoom;
  const left = (point) => (points[2 * point] - view.x) * scale() + width / 2;
  const top = (point) => (view.y - points[2 * point + 1]) * scale() + height / 2;
  const nameOf = (point) => classes[labels[point]].name;
  const neighboursOf = (point) => neighbours.subarray(k * point, k * (point + 1));

  const sheet = new Image();
  sheet.onload = () => {
    show(shown);
    draw();
  };
  sheet.src = data.sheet;

  const drawImage = (context, point, x, y, w, h) => {
    const row = Math.floor(point / data.columns);
    const [from, across] = [row * data.pitch, (point % data.columns) * data.pitch];
    context.drawImage(sheet, across, from, data.width, data.height, x, y, w, h);
  };

  const fill = (canvas, point) => {
    [canvas.width, canvas.height] = [data.width, data.height];
    if (sheet.complete) drawImage(canvas.getContext("2d"), point, 0, 0, data.width, data.height);
    canvas.style.imageRendering = "pixelated";
  };

  function show(point) {
    shown = point;
    image.style.visibility = point < 0 ? "hidden" : "visible";
    if (point < 0) {
      what.textContent = "No image is pointed at";
      near.textContent = "";
      image.setAttribute("aria-label", "No image");
      list.replaceChildren();
      return;
    }
    what.textContent = `${nameOf(point)} (image ${point})`;
    near.textContent = `Nearest ${data.space}:`;
    image.setAttribute("aria-label", what.textContent);
    image.style.borderColor = classes[labels[point]].color;
    fill(image, point);
    list.replaceChildren(
      ...Array.from(neighboursOf(point), (other) => {
        const picture = make("canvas");
        fill(picture, other);
        const same = labels[other] === labels[point];
        const label = `${nameOf(other)}, image ${other}${same ? "" : ", another class"}`;
        const button = make("button", { label, title: label }, picture, nameOf(other));
        button.classList.toggle("other", !same);
        button.onclick = () => {
          keep(other);
          map.focus();
        };
        return make("li", {}, button);
      }),
    );
  }

  function keep(point) {
    kept = point;
    show(point);
    if (point >= 0) {
      const [x, y] = [left(point), top(point)];
      if (x < 0 || y < 0 || x > width || y > height) {
        [view.x, view.y] = [points[2 * point], points[2 * point + 1]];
      }
      const names = Array.from(neighboursOf(point), nameOf).join(", ");
      status.textContent = `Image ${point}: ${nameOf(point)}. Nearest ${data.space}: ${names}.`;
    } else {
      status.textContent = "";
    }
    draw();
  }

  function pick(label) {
    if (!picked.delete(label)) picked.add(label);
    classButtons.forEach((button, at) => button.setAttribute("aria-pressed", picked.has(at)));
    if (kept >= 0 && !stands(kept)) keep(-1);
    draw();
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const before = scale();
    view.zoom = Math.min(ZOOM.most, Math.max(ZOOM.least, view.zoom * factor));
    // What lies at (x, y) stays there.
    view.x += (x - width / 2) * (1 / before - 1 / scale());
    view.y -= (y - height / 2) * (1 / before - 1 / scale());
    draw();
  }

  function showAll() {
    view = { x: 32768, y: 32768, zoom: 1 };
    draw();
  }

  // ---- Drawing ---------------------------------------------------------------------------------

  const discs = new Map();

  function disc(color, radius, ratio) {
    const key = `${color} ${radius} ${ratio}`;
    if (!discs.has(key)) {
      const side = 2 * radius + 2;
      const canvas = make("canvas", { width: side * ratio, height: side * ratio });
      const context = canvas.getContext("2d");
      context.scale(ratio, ratio);
      context.arc(side / 2, side / 2, radius, 0, 2 * Math.PI);
      context.fillStyle = color;
      context.fill();
      context.lineWidth = 0.75;
      context.strokeStyle = color === "#ddd" ? color : "rgba(0, 0, 0, 0.6)";
      context.stroke();
      discs.set(key, canvas);
    }
    return discs.get(key);
  }

  let waiting = false;

  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (width) drawNow();
    });
  }

  function drawNow() {
    const ratio = window.devicePixelRatio || 1;
    [map.width, map.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const context = map.getContext("2d");
    context.scale(ratio, ratio);
    const seen = [];
    for (let point = 0; point < count; point++) {
      const [x, y] = [left(point), top(point)];
      if (x > -20 && y > -20 && x < width + 20 && y < height + 20) seen.push(point);
    }
    const [front, back] = [seen.filter(stands), seen.filter((point) => !stands(point))];
    const radius = Math.min(7, Math.round(5 * view.zoom ** 0.35) / 2);
    const dot = (point, color, size = radius) => {
      const picture = disc(color, size, ratio);
      const side = picture.width / ratio;
      context.drawImage(picture, left(point) - side / 2, top(point) - side / 2, side, side);
    };
    back.forEach((point) => dot(point, "#ddd"));
    // Once they have room, images stand in place of dots.
    const side = 26;
    const asImages = sheet.complete && front.length * side ** 2 < 0.6 * width * height;
    const [w, h] = [data.width, data.height].map((of) => (side * of) / Math.max(data.width, data.height));
    const mark = (point, frame, extra) => {
      const color = classes[labels[point]].color;
      if (!asImages) return dot(point, color, radius + extra);
      const [x, y] = [left(point) - w / 2, top(point) - h / 2];
      context.fillStyle = frame || color;
      context.fillRect(x - 2 - extra, y - 2 - extra, w + 4 + 2 * extra, h + 4 + 2 * extra);
      drawImage(context, point, x, y, w, h);
    };
    front.forEach((point) => mark(point, null, 0));
    if (shown < 0) return;
    const lines = new Path2D();
    neighboursOf(shown).forEach((other) => {
      lines.moveTo(left(shown), top(shown));
      lines.lineTo(left(other), top(other));
    });
    [context.lineWidth, context.strokeStyle] = [4, "rgba(255, 255, 255, 0.8)"];
    context.stroke(lines);
    [context.lineWidth, context.strokeStyle] = [1.5, "#222"];
    context.stroke(lines);
    neighboursOf(shown).forEach((other) => mark(other, "#222", 1));
    mark(shown, "#222", 3);
    if (asImages) return;
    const box = radius + 6;
    context.strokeRect(left(shown) - box, top(shown) - box, 2 * box, 2 * box);
  }

  new ResizeObserver(() => {
    [width, height] = [map.clientWidth, map.clientHeight];
    draw();
  }).observe(map);

  // ---- Mouse, touch and keys -------------------------------------------------------------------

  function nearest(x, y) {
    let [best, least] = [-1, REACH ** 2];
    for (let point = 0; point < count; point++) {
      const away = (left(point) - x) ** 2 + (top(point) - y) ** 2;
      if (away < least && stands(point)) [best, least] = [point, away];
    }
    return best;
  }

  const at = (event) => {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left - map.clientLeft, event.clientY - box.top - map.clientTop];
  };
  const down = new Map(); // where each finger or button is
  let moved = 0;

  map.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, at(event));
    map.setPointerCapture(event.pointerId);
    if (down.size === 1) moved = 0;
  });

  map.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    const before = down.get(event.pointerId);
    if (!before) {
      if (kept >= 0) return;
      const point = nearest(x, y);
      if (point >= 0 && point !== shown) {
        show(point);
        draw();
      }
      return;
    }
    const others = [...down].filter(([finger]) => finger !== event.pointerId);
    if (others.length) {
      const [u, v] = others[0][1];
      const grown = Math.hypot(x - u, y - v) / Math.max(1, Math.hypot(before[0] - u, before[1] - v));
      zoom(grown, (x + u) / 2, (y + v) / 2);
      moved = Infinity;
    } else {
      moved += Math.hypot(x - before[0], y - before[1]);
      view.x -= (x - before[0]) / scale();
      view.y += (y - before[1]) / scale();
    }
    down.set(event.pointerId, [x, y]);
    draw();
  });

  map.addEventListener("pointerup", (event) => {
    down.delete(event.pointerId);
    if (moved < 4) keep(nearest(...at(event)));
  });

  map.addEventListener("pointercancel", (event) => down.delete(event.pointerId));

  map.addEventListener(
    "wheel",
    (event) => {
      // The page scrolls on until the reader has turned to the map.
      if (!event.ctrlKey && root.shadowRoot.activeElement !== map) return;
      event.preventDefault();
      zoom(Math.exp(-Math.sign(event.deltaY) * Math.min(0.4, Math.abs(event.deltaY) / 250)), ...at(event));
    },
    { passive: false },
  );

  function step(right, up) {
    if (shown < 0) return keep(middlemost());
    let [best, least] = [-1, Infinity];
    for (let point = 0; point < count; point++) {
      if (point === shown || !stands(point)) continue;
      const x = points[2 * point] - points[2 * shown];
      const y = points[2 * point + 1] - points[2 * shown + 1];
      const along = x * right + y * up;
      const aside = Math.abs(x * up) + Math.abs(y * right);
      const away = along ** 2 + 4 * aside ** 2;
      if (along > 0 && aside <= along && away < least) [best, least] = [point, away];
    }
    if (best >= 0) keep(best);
  }

  function middlemost() {
    let [best, least] = [-1, Infinity];
    for (let point = 0; point < count; point++) {
      const away = (left(point) - width / 2) ** 2 + (top(point) - height / 2) ** 2;
      if (away < least && stands(point)) [best, least] = [point, away];
    }
    return best;
  }

  const keys = {
    ArrowLeft: () => step(-1, 0),
    ArrowRight: () => step(1, 0),
    ArrowUp: () => step(0, 1),
    ArrowDown: () => step(0, -1),
    "+": () => zoom(ZOOM.step),
    "=": () => zoom(ZOOM.step),
    "-": () => zoom(1 / ZOOM.step),
    0: () => showAll(),
    Escape: () => keep(-1),
  };
  map.addEventListener("keydown", (event) => {
    if (!Object.hasOwn(keys, event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });

  // JupyterLab takes keys before the map hears them, unless the map bears this mark. Those with Ctrl,
  // such as to save, are left to it.
  window.addEventListener(
    "keydown",
    (event) => root.toggleAttribute("data-lm-suppress-shortcuts", !event.ctrlKey && !event.metaKey),
    true,
  );

  show(-1);
}
