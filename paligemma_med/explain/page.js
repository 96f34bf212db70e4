"use strict";
// The page's behaviour: maps from the arrays in #data, drawn over the picture; nothing is fetched.
(() => {
  const $ = id => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const [H, W] = data.grid, P = H * W, R = data.tokens.length, Q = data.prompt.length, S = P + Q + R;
  const L = data.layers, N = data.heads;

  // --- Arrays ---

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

  function half(h) {
    const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
    return sign * (e ? (1 + f / 1024) * 2 ** (e - 15) : f * 2 ** -24);
  }

  function unpack(a) {
    const raw = bytes(a.data), view = new DataView(raw.buffer), tops = new DataView(bytes(a.tops).buffer);
    const last = a.shape[a.shape.length - 1], out = new Float32Array(raw.length / (a.type === "u1" ? 1 : 2));
    for (let i = 0; i < out.length; i++) {
      const v = a.type === "u1" ? (raw[i] / 255) ** 2 : half(view.getUint16(2 * i, true));
      out[i] = v * tops.getFloat32(4 * Math.floor(i / last), true);
    }
    return out;
  }

  const raw = unpack(data.raw), mass = unpack(data.mass);
  const rawConstants = data.raw_constants && unpack(data.raw_constants);
  const maps = data.maps.map(m => ({ ...m, size: m.values.shape[1], values: unpack(m.values) }));

  // --- What is shown ---

  const state = {
    method: "", variant: "", layer: -1, head: -1, fuse: "mean", direction: "token",
    tokens: new Set(data.content), patches: new Set(), prompt: new Set(), cursor: Math.floor(H / 2) * W + Math.floor(W / 2),
    anchor: null,
  };
  const signed = () => data.signed.includes(state.method);
  const places = (chosen, count) => chosen < 0 ? [...Array(count).keys()] : [chosen];

  // One answer token's row by raw attention: fused over chosen layers and heads, as raw.raw does.
  function rawRow(r, layers, heads, fuse) {
    const out = new Float32Array(S).fill(fuse === "max" ? -Infinity : fuse === "min" ? Infinity : 0);
    for (const l of layers) for (const n of heads) {
      const from = ((l * N + n) * R + r) * S;
      for (let s = 0; s < S; s++) {
        const v = raw[from + s];
        out[s] = fuse === "max" ? Math.max(out[s], v) : fuse === "min" ? Math.min(out[s], v) : out[s] + v;
      }
    }
    if (fuse === "mean") for (let s = 0; s < S; s++) out[s] /= layers.length * heads.length;
    return out;
  }

  const kept = new Map();
  function row(r) {
    const key = [state.method, state.variant, state.layer, state.head, state.fuse, r].join("|");
    if (!kept.has(key)) {
      if (kept.size > 500) kept.clear();
      if (state.method === "raw") {
        kept.set(key, rawRow(r, places(state.layer, L), places(state.head, N), state.fuse));
      } else {
        const m = maps.find(m => m.method === state.method && m.variant === state.variant);
        kept.set(key, m.values.subarray(r * m.size, (r + 1) * m.size));
      }
    }
    return kept.get(key);
  }

  // Rows of the chosen tokens together: their mean; drops of log-probability add up.
  function rowOf(tokens) {
    const rows = [...tokens].map(row), out = new Float32Array(rows[0].length);
    for (const x of rows) for (let s = 0; s < out.length; s++) out[s] += x[s] / (signed() ? 1 : rows.length);
    return out;
  }

  // What of the chosen tokens' rows ends on learned constants, by which the image's columns were scaled up; or null.
  function onConstants(tokens) {
    const mean = x => x.reduce((a, b) => a + b, 0) / x.length;
    if (state.method !== "raw") {
      const m = maps.find(m => m.method === state.method && m.variant === state.variant);
      return m.constants && mean([...tokens].map(r => m.constants[r]));
    }
    if (!rawConstants || state.fuse !== "mean") return null;
    return mean([...tokens].flatMap(r => places(state.layer, L).flatMap(l => places(state.head, N).map(n => rawConstants[(l * N + n) * R + r]))));
  }

  const sum = (x, from, to) => { let t = 0; for (let i = from; i < to; i++) t += x[i]; return t; };
  const chosenTokens = () => state.tokens.size ? state.tokens : new Set(data.content);

  // --- Words and figures ---

  const piece = r => "“" + data.tokens[r].trim() + "”";
  function tokensInWords() {
    const t = [...chosenTokens()].sort((a, b) => a - b);
    if (t.length > 1 && data.content.every(r => state.tokens.has(r))) return "the whole answer";
    return t.map(piece).join(" ");
  }
  function number(v) {
    const a = Math.abs(v);
    return a === 0 ? "0" : a >= 1e4 ? v.toExponential(1) : a >= 0.1 ? v.toFixed(2) : a >= 0.001 ? v.toPrecision(2) : v.toExponential(1);
  }
  function percent(p) {
    if (p >= 0.995 && p < 1) return p < 0.9995 ? (100 * p).toFixed(1) + "\u00a0%" : "over 99.9\u00a0%";
    if (p < 1e-4) return "below 0.01\u00a0%";
    return (p >= 0.1 ? Math.round(100 * p) : Number((100 * p).toPrecision(2))) + "\u00a0%";
  }
  const probability = logprob => percent(Math.exp(Math.min(-1e-6, logprob)));
  const place = i => `row ${Math.floor(i / W) + 1}, column ${i % W + 1}`;
  function where(i) {
    const y = Math.floor(i / W) / H + 0.5 / H, x = i % W / W + 0.5 / W;
    const v = y < 1 / 3 ? "upper" : y > 2 / 3 ? "lower" : "middle", h = x < 1 / 3 ? "left" : x > 2 / 3 ? "right" : "centre";
    return v === "middle" && h === "centre" ? "centre" : v + " " + h;
  }
  function argmax(x, count) { let b = 0; for (let i = 1; i < count; i++) if (x[i] > x[b]) b = i; return b; }

  // --- Colours ---

  const tables = {};
  for (const [name, stops] of Object.entries(data.colours)) {
    const rgb = stops.split(" ").map(s => [0, 2, 4].map(i => parseInt(s.slice(i, i + 2), 16)));
    tables[name] = Array.from({ length: 256 }, (_, i) => {
      const t = i / 255 * (rgb.length - 1), a = Math.min(Math.floor(t), rgb.length - 2);
      return [0, 1, 2].map(c => rgb[a][c] + (t - a) * (rgb[a + 1][c] - rgb[a][c]));
    });
  }
  const table = () => tables[signed() ? "signed" : $("colours").value];

  // Value that is drawn with the first colour, with the last.
  function limits(x) {
    const kind = $("range").value, n = P;
    let low = Infinity, high = -Infinity;
    const over = kind === "shared" ? [...Array(R).keys()].map(row) : [x];
    for (const v of over) for (let i = 0; i < n; i++) { low = Math.min(low, v[i]); high = Math.max(high, v[i]); }
    if (signed()) {
      // What changes a probability by less than a tenth shall not look like much.
      const a = Math.max(Math.abs(low), Math.abs(high), kind === "stretch" ? 1e-9 : data.least);
      return [-a, a];
    }
    return kind === "stretch" ? [low, high > low ? high : low + 1] : [0, high || 1];
  }

  // --- Drawing ---

  const small = document.createElement("canvas"), faint = document.createElement("canvas");
  const canvas = $("map"), picture = $("picture");

  function paint(target, x, [low, high], { opacity, fade }) {
    target.width = W; target.height = H;
    const image = new ImageData(W, H), colours = table(), both = signed();
    for (let i = 0; i < P; i++) {
      const t = Math.min(1, Math.max(0, (x[i] - low) / (high - low))), c = colours[Math.round(255 * t)];
      const strength = both ? Math.abs(2 * t - 1) : t;
      image.data.set([c[0], c[1], c[2], 255 * opacity * (fade ? Math.sqrt(strength) : 1)], 4 * i);
    }
    target.getContext("2d").putImageData(image, 0, 0);
  }

  function outline(g, y0, x0, y1, x1, colour, dash) {
    const u = canvas.width / W, v = canvas.height / H;
    g.lineWidth = 4; g.strokeStyle = "#000"; g.setLineDash([]);
    g.strokeRect(x0 * u + 2, y0 * v + 2, (x1 - x0) * u - 4, (y1 - y0) * v - 4);
    g.lineWidth = 2; g.strokeStyle = colour; g.setLineDash(dash);
    g.strokeRect(x0 * u + 2, y0 * v + 2, (x1 - x0) * u - 4, (y1 - y0) * v - 4);
  }

  // The boxes that the answer has, with their numbers in the list beside it.
  function answerBoxes(g) {
    const size = Math.max(14, Math.round(canvas.width / 32));
    data.boxes.forEach(([y0, x0, y1, x1], i) => {
      outline(g, y0 * H, x0 * W, y1 * H, x1 * W, "#00e5ff", []);
      g.font = `bold ${size}px sans-serif`; g.textBaseline = "top"; g.setLineDash([]);
      const at = [Math.min(x0 * canvas.width + 5, canvas.width - size), Math.min(y0 * canvas.height + 4, canvas.height - size)];
      g.lineWidth = 4; g.strokeStyle = "#000"; g.strokeText(i + 1, ...at);
      g.fillStyle = "#00e5ff"; g.fillText(i + 1, ...at);
    });
  }

  function draw() {
    const x = rowOf(chosenTokens()), [low, high] = limits(x);
    const wide = Math.max(320, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
    canvas.width = wide; canvas.height = Math.round(wide * picture.height / picture.width) || wide;
    const g = canvas.getContext("2d");
    paint(small, x, [low, high], { opacity: Number($("opacity").value), fade: $("fade").checked });
    g.imageSmoothingEnabled = $("smooth").checked; g.imageSmoothingQuality = "high";
    g.drawImage(small, 0, 0, canvas.width, canvas.height);
    answerBoxes(g);
    const box = regionOf(state.patches);
    if (box && state.patches.size > 1) outline(g, ...box.box, "#fff", [8, 6]);
    for (const i of edges(state.patches)) line(g, ...i);
    if (document.activeElement === $("stage")) {
      const y = Math.floor(state.cursor / W), c = state.cursor % W;
      outline(g, y, c, y + 1, c + 1, "#ffd400", []);
    }
    const bar = $("scale").getContext("2d"), colours = table();
    for (let i = 0; i < 256; i++) {
      bar.fillStyle = `rgb(${colours[i].map(Math.round).join(",")})`;
      bar.fillRect(i, 0, 1, 14);
    }
    const even = 1 / P;  // what each patch had if the image's share were spread evenly over it
    const rest = x.length === S && !signed() ? sum(x, 0, P) * even : null;
    const marked = rest !== null && rest > low && rest < high;
    $("even").hidden = !marked;
    if (marked) {
      const at = Math.round(255 * (rest - low) / (high - low));
      bar.fillStyle = "#fff"; bar.fillRect(at - 1, 0, 3, 14); bar.fillStyle = "#000"; bar.fillRect(at, 0, 1, 14);
    }
    $("low").textContent = number(low); $("high").textContent = number(high);
  }

  // Outer edges of chosen patches, each [y0, x0, y1, x1] in patches.
  function edges(patches) {
    const out = [], has = (y, x) => y >= 0 && x >= 0 && y < H && x < W && patches.has(y * W + x);
    for (const i of patches) {
      const y = Math.floor(i / W), x = i % W;
      if (!has(y - 1, x)) out.push([y, x, y, x + 1]);
      if (!has(y + 1, x)) out.push([y + 1, x, y + 1, x + 1]);
      if (!has(y, x - 1)) out.push([y, x, y + 1, x]);
      if (!has(y, x + 1)) out.push([y, x + 1, y + 1, x + 1]);
    }
    return out;
  }
  function line(g, y0, x0, y1, x1) {
    const u = canvas.width / W, v = canvas.height / H;
    for (const [width, colour] of [[5, "#000"], [3, "#fff"]]) {
      g.setLineDash([]); g.lineWidth = width; g.strokeStyle = colour;
      g.beginPath(); g.moveTo(x0 * u, y0 * v); g.lineTo(x1 * u, y1 * v); g.stroke();
    }
  }

  function say() {
    const x = rowOf(chosenTokens()), top = argmax(x, P), name = data.methods[state.method][0].toLowerCase();
    const many = Math.max(1, Math.round(P / 10)), sorted = [...x.subarray(0, P)].sort((a, b) => b - a);
    const whole = sum(x, 0, P);
    let text = `${tokensInWords()} by ${name}${settings()}: `;
    text = text[0].toUpperCase() + text.slice(1);
    if (signed()) {
      const drop = x[top];
      text += drop > 0 ? `most is lost at ${place(top)} (${where(top)}): probability × ${number(Math.exp(-drop))}. `
        : "no cell makes it less probable. ";
      const low = argmax(x.map(v => -v), P);
      if (x[low] < 0) text += `At ${place(low)} it becomes more probable: × ${number(Math.exp(-x[low]))}. `;
    } else if (!(whole > 0)) {
      text += "nothing falls on the image.";
    } else {
      text += `highest at ${place(top)} (${where(top)}), ${number(x[top])}, ${number(x[top] * P / whole)} times an even spread. `;
      text += `The strongest ${many === 1 ? "patch holds" : many + " of " + P + " patches hold"} ${percent(sum(sorted, 0, many) / whole)} of what falls on the image.`;
      if (x.length === S && data.shares.includes(state.method)) {
        const all = sum(x, 0, S);
        const constants = onConstants(chosenTokens());
        if (constants !== null) text += ` ${percent(constants / whole)} of what falls on the image ends on learned constants (queries or a class token), which are no place in it: the map shows the rest, scaled up.`;
        text += ` Image ${percent(whole / all)}, prompt ${percent(sum(x, P, P + Q) / all)}, answer so far ${percent(sum(x, P + Q, S) / all)}.`;
      }
    }
    if (state.direction === "patch" && state.patches.size) text += " " + sharesInWords();
    if (state.direction === "prompt" && state.prompt.size) text += " " + sharesInWords();
    $("message").textContent = text;
  }

  function settings() {
    const parts = [];
    if (state.method === "raw") {
      if (state.layer >= 0) parts.push(`layer ${state.layer + 1}`);
      if (state.head >= 0) parts.push(`head ${state.head + 1}`);
      if (state.layer < 0 || state.head < 0) parts.push(`${state.fuse} of ${[state.layer < 0 && "layers", state.head < 0 && "heads"].filter(Boolean).join(" and ")}`);
    } else if (state.variant) parts.push(state.variant);
    return parts.length ? ` (${parts.join(", ")})` : "";
  }

  // --- From patches or the prompt to the answer's tokens ---

  function shares() {
    const from = state.direction === "patch" ? [...state.patches] : state.direction === "prompt" ? [...state.prompt].map(q => P + q) : [];
    if (!from.length) return null;
    const taken = [...Array(R).keys()].map(r => from.reduce((t, s) => t + (row(r)[s] ?? NaN), 0));
    if (taken.some(Number.isNaN)) return null;
    const total = taken.reduce((a, b) => a + b, 0);
    return { taken, share: taken.map(v => total > 0 ? v / total : 0) };
  }
  function sharesInWords() {
    const found = shares();
    const what = state.direction === "patch" ? (state.patches.size === 1 ? "the chosen patch" : `the ${state.patches.size} chosen patches`) : `the prompt’s ${[...state.prompt].map(q => "“" + data.prompt[q].trim() + "”").join(" ")}`;
    if (!found) return "This method says nothing of the prompt.";
    const order = [...found.taken.keys()].sort((a, b) => found.taken[b] - found.taken[a]).slice(0, 3);
    if (signed()) return `Without ${what}: ` + order.map(r => `${piece(r)} × ${number(Math.exp(-found.taken[r]))}`).join(", ") + (state.patches.size > 1 ? " (drops of single cells added up)." : ".");
    return `Of what the answer takes from ${what}, ` + order.map(r => `${piece(r)} has ${percent(found.share[r])}`).join(", ") + ".";
  }

  const chips = [...$("tokens").children], words = [...$("prompt").children];
  const figures = chips.map(c => c.querySelector(".figure").textContent);

  function level(chip, share) {
    const bar = chip.querySelector(".level");
    bar.hidden = share === null;
    if (share !== null) bar.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  }

  function mark() {
    const found = shares(), tokens = chosenTokens();
    chips.forEach((chip, r) => {
      chip.setAttribute("aria-pressed", tokens.has(r));
      chip.querySelector(".figure").textContent = !found ? figures[r] : signed() ? `× ${number(Math.exp(-found.taken[r]))}` : percent(found.share[r]);
      level(chip, found && !signed() ? found.share[r] : null);
    });
    const x = rowOf(chosenTokens()), has = x.length === S;
    const top = has ? Math.max(...x.subarray(P, P + Q)) : 0;
    words.forEach((chip, q) => {
      chip.setAttribute("aria-pressed", state.direction === "prompt" && state.prompt.has(q));
      level(chip, has && top > 0 ? x[P + q] / top : null);
      chip.title = has ? `${number(x[P + q])} of ${tokensInWords()}` : "";
    });
    for (const radio of document.querySelectorAll("[name=direction]")) {
      radio.checked = radio.value === state.direction;
      radio.disabled = radio.value === "prompt" && !has;
    }
  }

  // --- What if ---

  // The smallest precomputed rectangle around the patches.
  function regionOf(patches) {
    if (!data.regions || !patches.size) return null;
    const ys = [...patches].map(i => Math.floor(i / W)), xs = [...patches].map(i => i % W);
    const y0 = Math.min(...ys), x0 = Math.min(...xs), y1 = Math.max(...ys) + 1, x1 = Math.max(...xs) + 1;
    let best = null;
    data.regions.boxes.forEach((box, i) => {
      if (box[0] > y0 || box[1] > x0 || box[2] < y1 || box[3] < x1) return;
      const area = (box[2] - box[0]) * (box[3] - box[1]);
      if (!best || area < best.area) best = { box, area, i };
    });
    return best;
  }

  function whatIf() {
    if (!data.occlusion) return;
    const chosen = state.patches, shown = $("whatif-table");
    shown.hidden = !chosen.size;
    if (!chosen.size) { $("whatif").textContent = "Choose a patch, or drag over a region."; return; }
    const before = data.logprobs, map = maps.find(m => m.method === "occlusion");
    let after, what;
    const region = chosen.size > 1 ? regionOf(chosen) : null;
    if (region) {
      after = data.regions.logprobs[region.i];
      const [y0, x0, y1, x1] = region.box;
      what = `rows ${y0 + 1} to ${y1}, columns ${x0 + 1} to ${x1}`;
    } else if (chosen.size === 1 && map) {
      const i = [...chosen][0], cell = data.occlusion.cell;
      after = before.map((p, r) => p - map.values[r * map.size + i]);
      what = cell > 1 ? `the cell of ${cell} × ${cell} patches with ${place(i)}` : place(i);
    } else {
      shown.hidden = true;
      $("whatif").textContent = "No region of this size was computed beforehand.";
      return;
    }
    const total = x => x.reduce((a, b) => a + b, 0), now = total(before), then = total(after);
    $("whatif").textContent = `With ${what} replaced, the probability of this answer goes from ${probability(now)} to ${probability(then)} (log-probability ${(then - now > 0 ? "+" : "−") + Math.abs(then - now).toFixed(2)}).`;
    shown.caption.textContent = `Probability of each token, ${what} replaced`;
    shown.tBodies[0].replaceChildren(...before.map((p, r) => {
      const line = document.createElement("tr"), head = document.createElement("th");
      head.className = "w"; head.scope = "row"; head.textContent = data.tokens[r];
      line.append(head, ...[p, after[r]].map(v => {
        const cell = document.createElement("td");
        cell.textContent = probability(v);
        return cell;
      }));
      return line;
    }));
  }

  // --- Attention mass, heads ---

  function masses() {
    const tokens = [...chosenTokens()], heads = state.method === "raw" ? places(state.head, N) : places(-1, N);
    $("mass-of").textContent = `${tokensInWords()}, ${heads.length === 1 ? "head " + (heads[0] + 1) : "mean of heads"}`;
    [...$("mass").tBodies[0].rows].forEach((line, l) => {
      const parts = [0, 1, 2].map(k => {
        let t = 0;
        for (const n of heads) for (const r of tokens) t += mass[((l * N + n) * R + r) * 3 + k];
        return t / heads.length / tokens.length;
      });
      let at = 0;
      line.querySelectorAll("rect").forEach((rect, k) => {
        rect.setAttribute("x", 100 * at); rect.setAttribute("width", 100 * parts[k]); at += parts[k];
        line.cells[2 + k].textContent = `${Math.round(100 * parts[k])} %`;
      });
    });
  }

  const cells = [];
  function makeGallery() {
    const box = $("gallery");
    box.style.gridTemplateColumns = `max-content repeat(${N}, max-content)`;
    box.style.setProperty("--cell", `${Math.max(28, Math.min(64, Math.floor(440 / N)))}px`);
    for (let l = 0; l < L; l++) {
      const name = document.createElement("span");
      name.className = "name"; name.textContent = `layer ${l + 1}`;
      const of = document.createElement("div"); of.className = "name"; of.append(name.textContent); box.append(of);
      for (let n = 0; n < N; n++) {
        const button = document.createElement("button"), face = document.createElement("canvas"), share = document.createElement("span");
        button.type = "button"; button.append(face, share);
        button.addEventListener("click", () => choose({ method: "raw", layer: l, head: n }));
        box.append(button);
        cells.push({ l, n, button, face, share });
      }
    }
    roving(box, cells.map(c => c.button), N, i => cells[i].button.focus());
  }
  function gallery() {
    const tokens = [...chosenTokens()], colours = tables[$("colours").value];
    for (const { l, n, button, face, share } of cells) {
      const x = new Float32Array(P);
      let on = 0;
      for (const r of tokens) {
        const from = ((l * N + n) * R + r) * S;
        for (let i = 0; i < P; i++) x[i] += raw[from + i];
        on += mass[((l * N + n) * R + r) * 3] / tokens.length;
      }
      const top = x[argmax(x, P)] || 1, image = new ImageData(W, H);
      face.width = W; face.height = H;
      for (let i = 0; i < P; i++) image.data.set([...colours[Math.round(255 * x[i] / top)], 255], 4 * i);
      face.getContext("2d").putImageData(image, 0, 0);
      share.textContent = `${Math.round(100 * on)}`;
      button.setAttribute("aria-label", `layer ${l + 1}, head ${n + 1}: ${Math.round(100 * on)} % on the image, highest at ${place(argmax(x, P))}`);
      button.setAttribute("aria-pressed", state.method === "raw" && state.layer === l && state.head === n);
    }
  }

  // Every method's map of the chosen tokens, small.
  const views = [];
  function makeOverview() {
    for (const method of Object.keys(data.methods)) {
      if (method !== "raw" && !maps.some(m => m.method === method)) continue;
      const button = document.createElement("button"), face = document.createElement("canvas");
      button.type = "button";
      button.append(face, data.methods[method][0]);
      button.addEventListener("click", () => choose({ method }));
      $("overview").append(button);
      views.push({ method, button, face });
    }
    roving($("overview"), views.map(v => v.button), 1, i => views[i].button.focus());
  }
  function overview() {
    const { method, variant } = state;
    for (const view of views) {
      // As the large one would be, but at the method's own first variant.
      state.method = view.method;
      if (view.method !== method) state.variant = variants(view.method)[0] ?? "";
      const x = rowOf(chosenTokens()), g = view.face.getContext("2d");
      view.face.width = 200; view.face.height = Math.round(200 * picture.height / picture.width) || 200;
      if (picture.complete && picture.naturalWidth) g.drawImage(picture, 0, 0, view.face.width, view.face.height);
      paint(faint, x, limits(x), { opacity: 0.85, fade: true });
      g.imageSmoothingEnabled = false;
      g.drawImage(faint, 0, 0, view.face.width, view.face.height);
      view.button.setAttribute("aria-pressed", view.method === method);
      view.button.setAttribute("aria-label", `${data.methods[view.method][0]}: highest at ${place(argmax(x, P))}`);
      Object.assign(state, { method, variant });
    }
  }
  const variants = method => maps.filter(m => m.method === method).map(m => m.variant);

  // --- Keyboard and mouse ---

  // One tab stop for a row of buttons; arrows move in it.
  function roving(box, buttons, step, moved) {
    buttons.forEach((b, i) => { b.tabIndex = i ? -1 : 0; });
    box.addEventListener("keydown", e => {
      const i = buttons.indexOf(document.activeElement);
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: step, ArrowUp: -step }[e.key];
      const to = e.key === "Home" ? 0 : e.key === "End" ? buttons.length - 1 : i + by;
      if (i < 0 || !(to >= 0 && to < buttons.length)) return;
      e.preventDefault();
      moved(to, e.shiftKey);
    });
    box.addEventListener("focusin", () => {
      const i = buttons.indexOf(document.activeElement);
      if (i >= 0) buttons.forEach((b, k) => { b.tabIndex = k === i ? 0 : -1; });
    });
  }

  function take(set, i, more) {
    if (!more) { set.clear(); set.add(i); } else if (set.has(i)) set.delete(i); else set.add(i);
  }
  function chooseToken(r, more) { take(state.tokens, r, more); choose({ direction: "token" }); }
  function choosePrompt(q, more) { take(state.prompt, q, more); choose({ direction: "prompt" }); }
  chips.forEach((c, r) => c.addEventListener("click", e => chooseToken(r, e.shiftKey || e.ctrlKey || e.metaKey)));
  words.forEach((c, q) => c.addEventListener("click", e => choosePrompt(q, e.shiftKey || e.ctrlKey || e.metaKey)));
  roving($("tokens"), chips, 1, (i, shift) => {
    chips[i].focus();
    if (shift) { state.tokens.add(i); choose({ direction: "token" }); } else chooseToken(i, false);
  });
  roving($("prompt"), words, 1, i => words[i].focus());
  $("all").addEventListener("click", () => { state.tokens = new Set(data.content); choose({ direction: "token" }); });

  function rectangle(a, b) {
    const ys = [a, b].map(i => Math.floor(i / W)).sort((p, q) => p - q), xs = [a, b].map(i => i % W).sort((p, q) => p - q), out = new Set();
    for (let y = ys[0]; y <= ys[1]; y++) for (let x = xs[0]; x <= xs[1]; x++) out.add(y * W + x);
    return out;
  }
  function patchAt(e) {
    const box = canvas.getBoundingClientRect(), clip = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
    return clip((e.clientY - box.top) / box.height, H) * W + clip((e.clientX - box.left) / box.width, W);
  }
  const stage = $("stage");
  let pressed = null, before = null;
  stage.addEventListener("pointerdown", e => {
    if (e.button) return;
    stage.setPointerCapture(e.pointerId);
    pressed = state.cursor = patchAt(e);
    before = e.shiftKey ? new Set(state.patches) : new Set();
    const again = !e.shiftKey && state.patches.size === 1 && state.patches.has(pressed);
    state.patches = again ? new Set() : new Set([...before, pressed]);
    state.direction = "patch";
    stage.focus({ preventScroll: true });
    draw();
  });
  stage.addEventListener("pointermove", e => {
    const i = patchAt(e);
    $("readout").textContent = `${place(i)}: ${number(rowOf(chosenTokens())[i])}`;
    if (pressed === null || i === state.cursor) return;
    state.cursor = i;
    state.patches = new Set([...before, ...rectangle(pressed, i)]);
    draw();
  });
  stage.addEventListener("pointerleave", () => { $("readout").textContent = ""; });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => {
    if (pressed === null) return;
    pressed = null;
    choose({ direction: state.patches.size ? "patch" : "token" });
  });
  stage.addEventListener("keydown", e => {
    const y = Math.floor(state.cursor / W), x = state.cursor % W;
    const to = { ArrowUp: [y - 1, x], ArrowDown: [y + 1, x], ArrowLeft: [y, x - 1], ArrowRight: [y, x + 1] }[e.key];
    if (to) {
      e.preventDefault();
      const from = state.anchor ?? state.cursor;
      state.cursor = Math.max(0, Math.min(H - 1, to[0])) * W + Math.max(0, Math.min(W - 1, to[1]));
      state.anchor = e.shiftKey ? from : null;
      state.patches = e.shiftKey ? rectangle(from, state.cursor) : new Set([state.cursor]);
      choose({ direction: "patch" });
    } else if (e.key === " " || e.key === "Enter") {
      e.preventDefault();
      take(state.patches, state.cursor, true);
      choose({ direction: state.patches.size ? "patch" : "token" });
    } else if (e.key === "Escape") {
      state.patches.clear(); state.anchor = null;
      choose({ direction: "token" });
    }
  });
  stage.addEventListener("focus", draw);
  stage.addEventListener("blur", draw);

  // --- Controls ---

  function option(value, text) {
    const o = document.createElement("option");
    o.value = value; o.textContent = text;
    return o;
  }
  for (const [id, count, what] of [["layer", L, "layers"], ["head", N, "heads"]]) {
    $(id).append(option(-1, `all ${count} ${what}`), ...[...Array(count).keys()].map(i => option(i, i + 1)));
    $(id).addEventListener("change", e => choose({ [id]: Number(e.target.value) }));
  }
  $("fuse").addEventListener("change", e => choose({ fuse: e.target.value }));
  $("method").addEventListener("change", e => choose({ method: e.target.value }));
  $("variant").addEventListener("change", e => choose({ variant: e.target.value }));
  $("direction").addEventListener("change", e => {
    if (e.target.value === "patch" && !state.patches.size) state.patches.add(state.cursor);
    if (e.target.value === "prompt" && !state.prompt.size) state.prompt.add(0);
    choose({ direction: e.target.value });
  });
  for (const id of ["opacity", "fade", "smooth"]) $(id).addEventListener("input", draw);
  for (const id of ["colours", "range"]) $(id).addEventListener("change", () => { draw(); gallery(); overview(); });
  const shown = picture.getAttribute("src"), seen = $("show").dataset.seen;
  $("show").addEventListener("change", e => {
    picture.classList.toggle("pixels", e.target.value === "seen");
    picture.src = e.target.value === "seen" ? seen : shown;
  });
  $("save").addEventListener("click", () => {
    const out = document.createElement("canvas"), g = out.getContext("2d");
    out.width = canvas.width; out.height = canvas.height;
    g.drawImage(picture, 0, 0, out.width, out.height);
    g.drawImage(canvas, 0, 0);
    const link = document.createElement("a");
    link.download = `saliency_${state.method}.png`;
    link.href = out.toDataURL("image/png");
    link.click();
  });

  function choose(changes) {
    const old = state.method;
    Object.assign(state, changes);
    if (state.method !== old) {
      const found = variants(state.method);
      $("variant").replaceChildren(...found.map(v => option(v, v || "only one")));
      state.variant = found.includes(state.variant) ? state.variant : found[0] ?? "";
    }
    const ofRaw = state.method === "raw";
    $("method").value = state.method; $("variant").value = state.variant; $("fuse").value = state.fuse;
    $("layer").value = state.layer; $("head").value = state.head;
    $("variant-label").hidden = ofRaw || $("variant").options.length < 2;
    for (const id of ["layer", "head", "fuse"]) { $(id).disabled = !ofRaw; $(id).parentElement.hidden = !ofRaw; }
    $("about-method").textContent = data.methods[state.method][1];
    $("colours").disabled = signed();
    if (state.direction === "prompt" && row(0).length !== S) state.direction = "token";
    draw(); mark(); say(); whatIf(); masses(); gallery(); overview();
  }

  // The picture and its map fit into a window together with what is said of them.
  stage.style.maxWidth = `max(16rem, ${(56 * picture.getAttribute("width") / picture.getAttribute("height")).toFixed(2)}vh)`;
  makeGallery();
  makeOverview();
  choose({ method: data.first });
  new ResizeObserver(draw).observe(canvas);
  picture.addEventListener("load", () => { draw(); overview(); });
})();
