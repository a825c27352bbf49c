// The bucket explorer: the buckets that token t sees, the state that decoding keeps, and its bytes.
// Plain JavaScript: no library, no build step, no network. Every number and sentence comes from model.js.
// One element stands for one level, because a token has at most one bucket of each level.
(() => {
  "use strict";

  const {
    LARGEST, LEVELS, MODELS, bitLength, ones, bucketsOf, counterOf, bytesOf,
    number, plural, span, chunks, human, numberError, sizeError, caption,
  } = window.bucketModel;

  const ROOMS = [64, 1024, 32768, LARGEST + 1];
  const HISTORY = 12; // earlier tokens drawn above token t
  const EXAMPLE = Array.from({ length: LEVELS }, (_, level) => [1.1, 0.2, 0.9, -0.4, 0.6, 1.3, -0.2][level % 7]);
  const FLAT = Array(LEVELS).fill(Math.log(Math.E - 1)); // softplus of it is 1

  // What is drawn. x is the input of softplus for each level; step counts the steps of a carry.
  const view = { t: 47, C: 1, room: 64, scale: "position", chosen: 4, step: 0, x: [...EXAMPLE] };
  const sizes = { dtype: "bfloat16", entries: "float32", ...MODELS.mamba2 };

  const lambdaOf = (level) => Math.log1p(Math.exp(view.x[level])); // softplus

  /** Near is yellow, far is violet. Lightness falls with every level, so the order survives colour blindness. */
  function paint(element, level) {
    const x = Math.min(level / bitLength(view.room - 1), 1);
    element.style.setProperty("--level", `oklch(${0.9 - 0.4 * x} 0.16 ${88 - 148 * x})`);
    element.style.setProperty("--on-level", x < 0.78 ? "#000" : "#fff");
  }

  // -------------------------------------------------------------------------------------------------------- template

  const each = (list, html) => list.map(html).join("");
  const upTo = (n) => [...Array(n).keys()];
  const far = upTo(LEVELS).reverse();
  const select = (attribute, text, pairs) =>
    `${text}<select ${attribute}>${each(pairs, ([value, shown]) => `<option value="${value}">${shown}</option>`)}</select>`;
  const size = (name, text) =>
    `<label>${text}<input type="number" min="1" max="65536" step="1" inputmode="numeric" data-size="${name}"></label>`;
  const FLOATS = [["float32", "float32"], ["bfloat16", "bfloat16"]];
  const LAYERS = [["mamba2", "Log-Linear Mamba-2"], ["deltanet", "Log-Linear Gated DeltaNet"], ["own", "your own sizes"]];

  const TEMPLATE = `
    <div class="be-controls">
      <label class="be-wide">Token t<input type="range" min="0" step="1" data-part="slider"></label>
      <div class="be-exact">
        <button type="button" data-part="less" aria-label="One token back">−</button>
        <input type="number" min="0" max="${LARGEST}" step="1" inputmode="numeric" aria-label="Token t" data-part="exact">
        <button type="button" data-part="more" aria-label="One token on">+</button>
      </div>
      <label>${select('data-part="room"', "Sequence length", ROOMS.map((n) => [n, number(n)]))}</label>
      <label>${select('data-part="C"', "Chunk size C", [1, 4, 16, 64].map((n) => [n, n]))}</label>
      <label>${select('data-part="scale"', "Draw tokens", [["position", "by position"], ["distance", "by distance (log)"]])}</label>
      <p class="be-examples">Try
        <button type="button" data-try="47 1 64 position">token by token</button>
        <button type="button" data-try="700 64 1024 position">chunks of 64</button>
        <button type="button" data-try="1000000 64 ${LARGEST + 1} distance">a million tokens</button></p>
      <p class="be-error" role="alert" data-part="error" hidden></p>
    </div>

    <section aria-label="What token t sees">
      <h2 data-part="heading"></h2>
      <p class="be-binary"><span data-part="binary"></span><span data-part="reading"></span></p>
      <div class="be-history" aria-hidden="true" data-part="history"></div>
      <div class="be-line" role="group" aria-label="Buckets from far to near. Arrow keys move between them." data-part="line">
        ${each(far, (level) =>
          `<button type="button" class="be-bucket" data-level="${level}"><i></i><b>${level}</b></button>`)}
        <div class="be-future" data-part="future"></div>
      </div>
      <div class="be-axis" aria-hidden="true" data-part="axis"></div>
      <p class="be-note">Height is λ. The thin rows show what the tokens before t saw. Stripes are raw tokens.</p>
      <div class="be-details" data-part="details"></div>
      <div class="be-rows" role="list" data-part="rows">
        ${each(far, (level) => `<div role="listitem" data-level="${level}"><b>${level}</b><span></span><span></span>
          <label><span>λ<sub>t</sub>[${level}]</span><input type="range" min="-4" max="4" step="0.05"><output></output></label>
        </div>`)}
      </div>
      <p class="be-actions"><button type="button" data-part="flat">All λ = 1: the linear model</button>
        <button type="button" data-part="example">Example λ</button></p>
    </section>

    <section aria-label="What decoding keeps">
      <h2 data-part="kept"></h2>
      <p>The number of closed chunks is a binary counter, and its digits are states. When a chunk closes, the counter goes up
        by one, and the carry merges states.</p>
      <div class="be-slots" role="list" aria-label="Slots, largest first" data-part="slots"></div>
      <div class="be-hand">
        <div class="be-carried" data-part="carried"></div>
        <div><small>Open chunk, raw tokens</small><div class="be-open" data-part="open"></div></div>
      </div>
      <p class="be-caption" data-part="caption"></p>
      <p class="be-actions"><button type="button" data-part="back">Back</button>
        <button type="button" class="be-main" data-part="next"></button></p>
    </section>

    <section aria-label="Memory">
      <h2 data-part="verdict"></h2>
      <p>One layer, one sequence. The state has just enough slots for t tokens, and the cache has room for t tokens.
        <span data-part="advice"></span></p>
      <div class="be-sizes">
        <label class="be-wide">${select('data-part="model"', "Layer", LAYERS)}</label>
        <label class="be-wide">${select('data-size="rule"', "Transition", [["scalar", "scalar gate"], ["delta", "delta rule"]])}</label>
        ${size("H", "Value heads H")}${size("G", "Key groups G")}${size("K", "Key width K")}${size("V", "Value width V")}
        <label>${select('data-size="dtype"', "q, k, v", FLOATS)}</label>
        <label>${select('data-size="entries"', "Entries", FLOATS)}</label>
        ${size("heads", "Cache heads")}${size("width", "Cache width")}
      </div>
      <p class="be-error" role="alert" data-part="wrong" hidden></p>
      <div class="be-memory" data-part="memory">
        <table class="be-table"><caption>Bytes after <span data-part="after"></span></caption><tbody data-part="bytes"></tbody></table>
        <div class="be-plot" role="img" data-part="plot"></div>
      </div>
    </section>
    <p class="be-status" role="status" data-part="status"></p>`;

  function start(root) {
    root.innerHTML = TEMPLATE;
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const line = [...root.querySelectorAll(".be-bucket")], rows = [...part("rows").children]; // far to near
    const levelOf = (element) => Number(element.dataset.level);

    // -------------------------------------------------------------------------------------------- what token t sees

    /** Where the boundary before token s is drawn, in a unit that only the line knows. */
    const place = (s) => (view.scale === "distance" ? -Math.log2(view.t + 2 - s) : s);
    const end = () => (view.scale === "distance" ? view.t + 1 : view.room);
    const stretch = (element, start, stop) => element.style.setProperty("--size", place(stop) - place(start));

    function drawLine(seen) {
      const highest = Math.max(...seen.map(({ level }) => lambdaOf(level)));
      for (const element of [...line, ...rows]) {
        const level = levelOf(element), bucket = seen.find((b) => b.level === level);
        element.hidden = !bucket;
        if (!bucket) continue;
        paint(element, level);
        stretch(element, bucket.start, bucket.stop);
        element.style.setProperty("--height", lambdaOf(level) / highest);
        element.classList.toggle("be-raw", bucket.entry === null);
        Object.assign(element.dataset, { entry: bucket.entry ?? "", start: bucket.start, stop: bucket.stop });
      }
      stretch(part("future"), view.t + 1, end());
    }

    /** The names of the buckets, seen and spoken, and their λ. */
    function drawLabels(seen) {
      for (const { level, entry, start, stop } of seen) {
        const row = rows[LEVELS - 1 - level], [, what, where] = row.children, slider = row.querySelector("input");
        const name = entry === null ? (level ? "open chunk" : "itself") : `entry ${number(entry)}`;
        const lambda = `λ ${lambdaOf(level).toFixed(2)}`, tokens = plural(stop - start, "token");
        what.textContent = name;
        where.innerHTML = `${span(start, stop)} <small>${tokens}</small>`;
        row.querySelector("output").textContent = lambda.slice(2);
        slider.value = view.x[level];
        slider.setAttribute("aria-valuetext", lambda);
        const label = `Level ${level}, ${name}, ${tokens}, ${span(start, stop)}, ${lambda}`;
        line[LEVELS - 1 - level].setAttribute("aria-label", label);
      }
    }

    function drawDetails(seen) {
      const { level, entry, start, stop } = seen.find((b) => b.level === view.chosen) ?? seen.at(-1), { C, t } = view;
      const cells = [["Level", level], ["Entry", entry === null ? "none" : number(entry)], ["Tokens", span(start, stop)],
        ["Size", plural(stop - start, "token")], [`λ<sub>t</sub>[${level}]`, lambdaOf(level).toFixed(2)]];
      const raw = `${level ? "Raw tokens of the open chunk" : "The token itself"}, not yet in a state.`;
      const state = `Entry ${number(entry ?? 0)} is one K × V state${C > 1 ? ` and holds ${chunks(start / C, stop / C)}` : ""}.`;
      part("details").innerHTML = `<dl>${each(cells, ([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        <p>${entry === null ? raw : state} Token ${number(t)} multiplies what it reads there by λ<sub>t</sub>[${level}].</p>`;
      paint(part("details"), level);
      for (const element of [...line, ...rows]) element.classList.toggle("be-chosen", levelOf(element) === level);
      for (const element of line) element.tabIndex = levelOf(element) === level ? 0 : -1;
    }

    /** Thin rows: the same line as the tokens just before t saw it. */
    function drawHistory() {
      const earlier = upTo(Math.min(HISTORY, view.t)).map((i) => view.t - i - 1).reverse();
      part("history").replaceChildren(...earlier.map((t) => {
        const row = document.createElement("div");
        for (const { level, start, stop } of bucketsOf(t, view.C).reverse()) {
          const piece = row.appendChild(document.createElement("i"));
          paint(piece, level);
          stretch(piece, start, stop);
        }
        stretch(row.appendChild(document.createElement("span")), t + 1, end());
        return row;
      }));
    }

    function drawAxis() {
      const { t, room } = view, back = [[1, "token t"], [32, "32 back"], [1024, "1K back"], [32768, "32K back"]];
      const ticks = view.scale === "distance"
        ? back.map(([d, text]) => [t + 1 - d, text]).filter(([s]) => s >= 0)
        : upTo(5).map((i) => [(room * i) / 4, number((room * i) / 4)]);
      part("axis").innerHTML = each(ticks, ([s, text]) => {
        const x = (place(s) - place(0)) / (place(end()) - place(0));
        return `<span style="left:${100 * x}%;--x:${x}">${text}</span>`;
      });
    }

    /** The digits of t: digit 1 number i from the right is the bucket of level i. */
    function drawBinary() {
      const { t, C } = view, inside = bitLength(C) - 1, digits = Math.max(bitLength(t), inside, 1);
      part("binary").innerHTML = `<span>${number(t)} =</span>` + each([...t.toString(2).padStart(digits, "0")], (digit, i) =>
        `<b class="${digit === "1" ? "be-one" : ""} ${digits - i === inside && i ? "be-gap" : ""}">${digit}</b>`);
      [...part("binary").children].slice(1).forEach((element, i) => paint(element, digits - i));
      part("reading").textContent = "One bucket for every digit 1, and one for the token itself." + (C === 1 ? "" :
        ` The last ${inside} digits count tokens of chunk ${number(Math.floor(t / C))}. The others count the chunks before it.`);
    }

    // ------------------------------------------------------------------------------------------- what decoding keeps

    function drawCounter() {
      const { t, C, step } = view, { chunk, entry, last, slots, open, carried } = counterOf(t, C, step), leaf = bitLength(C);
      part("kept").textContent = `Decoding keeps ${plural(ones(chunk), "state")} and ${plural(t % C, "raw token")}`;
      part("slots").innerHTML = slots.map((held, m) => held === null
        ? `<div role="listitem" data-slot="${m}" class="be-dead"><b>0</b><small>slot ${m}</small>empty</div>`
        : `<div role="listitem" data-slot="${m}" data-entry="${held}"><b>1</b><small>slot ${m}</small>entry ${number(held)}</div>`,
      ).reverse().join("");
      for (const slot of part("slots").children) paint(slot, leaf + Number(slot.dataset.slot));
      part("carried").innerHTML = `<small>Carry</small>` +
        (carried ? `<b>entry ${number(entry)}</b>${chunks(entry - carried, entry)}` : "nothing");
      part("carried").classList.toggle("be-dead", !carried);
      paint(part("carried"), leaf + Math.max(step - 1, 0));
      part("open").innerHTML = each(upTo(C), (i) => `<i class="${i < open ? "be-full" : ""}"></i>`);
      part("caption").textContent = caption(t, C, step);
      part("back").disabled = !step && !t;
      part("next").disabled = step === last && entry * C > LARGEST;
      part("next").textContent = !step ? `Close chunk ${number(chunk)}`
        : step < last ? `Merge slot ${step - 1}` : `Put entry ${number(entry)} into slot ${last - 1}`;
    }

    function stepOn() {
      const { t, C, step } = view, { entry, last } = counterOf(t, C, step);
      return step < last ? { step: step + 1 } : { t: entry * C };
    }

    function stepBack() {
      const { t, C, step } = view, { chunk } = counterOf(t, C, step);
      if (step) return { step: step - 1 };
      return t % C ? { t: chunk * C } : { t: t - C, step: counterOf(t - C, C, 0).last };
    }

    // --------------------------------------------------------------------------------------------------------- memory

    function drawMemory() {
      const { t, C } = view, wrong = sizeError(sizes);
      for (const input of root.querySelectorAll("[data-size]"))
        if (input !== document.activeElement) input.value = sizes[input.dataset.size];
      show("wrong", wrong);
      part("memory").hidden = Boolean(wrong);
      if (wrong) return;
      const bytes = bytesOf(t, C, sizes), ratio = bytes.cache / bytes.state;
      const factor = (n) => `${n >= 9.95 ? number(Math.round(n)) : n.toFixed(1)} times`;
      part("verdict").textContent = ratio > 1
        ? `The KV cache is ${factor(ratio)} as large as the state` : `The state is ${factor(1 / ratio)} as large as the KV cache`;
      part("advice").textContent = C === 64 ? "" : "The library decodes with C = 64.";
      part("after").textContent = plural(t, "token");
      const table = [["entries", `Entries, ${ones(Math.floor(t / C))} of ${plural(bytes.slots, "slot")} live`],
        ["decay", "Log decays of the entries"], ["open", `Open chunk, room for ${plural(C, "token")}`],
        ["position", "Position"], ["state", "State"], ["cache", "KV cache"]];
      part("bytes").innerHTML = each(table.filter(([name]) => bytes[name]), ([name, text]) =>
        `<tr data-bytes="${name}"><th scope="row">${text}</th><td>${number(bytes[name])}</td><td>${human(bytes[name])}</td></tr>`);
      drawPlot(bytes);
    }

    /** Bytes against t, both logarithmic. The state grows at powers of two only, so its steps are exact. */
    function drawPlot(now) {
      const points = upTo(LEVELS).map((k) => bytesOf(2 ** k, view.C, sizes)), last = points.at(-1);
      const all = points.flatMap(({ state, cache }) => [Math.log2(state), Math.log2(cache)]);
      const low = Math.min(...all) - 1, high = Math.max(...all) + 2;
      const x = (tokens) => (100 * Math.log2(Math.max(tokens, 1))) / (LEVELS - 1);
      const y = (bytes) => (100 * (high - Math.log2(bytes))) / (high - low);
      const steps = each(points, ({ state }, k) => (k ? `H${x(2 ** k)}V` : "M0 ") + y(state));
      const slope = each(points, ({ cache }, k) => `${k ? "L" : "M"}${x(2 ** k)} ${y(cache)}`);
      const across = [[1, "1 token"], [32, "32"], [1024, "1K"], [32768, "32K"], [LARGEST + 1, "1M"]];
      const up = [[10, "1 KiB"], [20, "1 MiB"], [30, "1 GiB"]].filter(([power]) => power > low && power < high);
      const grid = each(across, ([n]) => `M${x(n)} 0V100`) + each(up, ([power]) => `M0 ${y(2 ** power)}H100`);
      part("plot").innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">
          <path class="be-grid" d="${grid}"/><path class="be-cache" d="${slope}"/><path class="be-state" d="${steps}"/></svg>
        ${each(across, ([n, text]) => `<span class="be-x" style="left:${x(n)}%;--x:${x(n) / 100}">${text}</span>`)}
        ${each(up, ([power, text]) => `<span class="be-y" style="top:${y(2 ** power)}%">${text}</span>`)}
        ${each([["cache", "KV cache"], ["state", "log-linear state"]], ([kind, text]) =>
          `<b class="be-${kind}" style="top:${y(last[kind])}%">${text}</b>
           <i class="be-dot be-${kind}" style="left:${x(view.t)}%;top:${Math.min(y(now[kind]), 100)}%"></i>`)}`;
      part("plot").setAttribute("aria-label", `Bytes against tokens. At a million tokens the KV cache has ` +
        `${human(last.cache)} and the state ${human(last.state)}.`);
    }

    // -------------------------------------------------------------------------------------------------------- events

    function show(name, text) {
      part(name).textContent = text;
      part(name).hidden = !text;
    }

    function drawBuckets() {
      const seen = bucketsOf(view.t, view.C), name = `Token ${number(view.t)}`, count = plural(seen.length, "bucket");
      drawLine(seen);
      drawLabels(seen);
      drawDetails(seen);
      part("heading").textContent = `${name} sees ${count}`;
      part("slider").setAttribute("aria-valuetext", `${name}, ${count}`);
    }

    function draw() {
      for (const name of ["room", "C", "scale"]) part(name).value = view[name];
      part("slider").max = view.room - 1;
      part("slider").value = view.t;
      if (part("exact") !== document.activeElement) part("exact").value = view.t;
      part("less").disabled = view.t === 0;
      part("more").disabled = view.t === LARGEST;
      show("error", "");
      for (const step of [drawBuckets, drawHistory, drawAxis, drawBinary, drawCounter, drawMemory]) step();
    }

    /** Change the view. A longer sequence is drawn where t needs it. `spoken` names the part that a screen reader says. */
    function go(changes, spoken) {
      const next = { ...view, step: 0, ...changes }, wrong = numberError("t", next.t, 0, LARGEST);
      if (wrong) return show("error", wrong);
      next.room = ROOMS.find((room) => room >= next.room && room > next.t);
      Object.assign(view, next);
      draw();
      if (spoken) part("status").textContent = part(spoken).textContent;
    }

    function choose({ target }) {
      const element = target.closest("[data-level]");
      if (!element || levelOf(element) === view.chosen) return;
      view.chosen = levelOf(element);
      drawDetails(bucketsOf(view.t, view.C));
    }

    /** Arrow keys, Home and End move along the line. */
    function walk(event) {
      const shown = line.filter((element) => !element.hidden), here = shown.indexOf(event.target);
      const next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: shown.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      shown[next]?.focus();
    }

    const on = (name, event, act) => part(name).addEventListener(event, act);
    const onEach = (selector, event, act) => {
      for (const element of root.querySelectorAll(selector)) element.addEventListener(event, () => act(element));
    };
    on("slider", "input", () => go({ t: part("slider").valueAsNumber }));
    on("exact", "input", () => go({ t: part("exact").valueAsNumber }, "heading"));
    on("exact", "blur", draw);
    on("less", "click", () => go({ t: view.t - 1 }, "heading"));
    on("more", "click", () => go({ t: view.t + 1 }, "heading"));
    on("C", "change", () => go({ C: Number(part("C").value) }, "heading"));
    on("scale", "change", () => go({ scale: part("scale").value }));
    on("room", "change", () => {
      const room = Number(part("room").value);
      go({ room, t: Math.min(view.t, room - 1) }, "heading");
    });
    onEach("[data-try]", "click", ({ dataset }) => {
      const [t, C, room, scale] = dataset.try.split(" ");
      go({ t: Number(t), C: Number(C), room: Number(room), scale }, "heading");
    });
    for (const name of ["line", "rows"]) for (const event of ["pointerover", "focusin", "click"]) on(name, event, choose);
    on("line", "keydown", walk);
    on("rows", "input", ({ target }) => {
      view.x[levelOf(target.closest("[data-level]"))] = target.valueAsNumber;
      drawBuckets();
    });
    for (const [name, x] of [["flat", FLAT], ["example", EXAMPLE]])
      on(name, "click", () => {
        view.x = [...x];
        drawBuckets();
      });
    on("back", "click", () => go(stepBack(), "caption"));
    on("next", "click", () => go(stepOn(), "caption"));
    on("model", "change", () => {
      Object.assign(sizes, MODELS[part("model").value]);
      drawMemory();
    });
    onEach("[data-size]", "input", (input) => {
      sizes[input.dataset.size] = input.type === "number" ? input.valueAsNumber : input.value;
      if (input.dataset.size in MODELS.mamba2) part("model").value = "own";
      drawMemory();
    });
    draw();
  }

  // A site that changes pages without loading them (mkdocs-material) tells it through document$.
  const startAll = () => document.querySelectorAll(".bucket-explorer:empty").forEach(start);
  startAll();
  window.document$?.subscribe(startAll);
})();
