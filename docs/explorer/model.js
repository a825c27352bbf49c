// The model behind the bucket explorer: the partition (loglinear/fenwick.py), the bytes (loglinear/decoding_state.py) and the
// words for them. Nothing here touches the page. A test compares the page with the Python functions.
window.bucketModel = (() => {
  "use strict";

  // ------------------------------------------------------------------------------------------------------- partition

  const LARGEST = 2 ** 20 - 1; // largest t
  const LEVELS = 21; // levels of 2**20 tokens
  const bitLength = (n) => 32 - Math.clz32(n);
  const lowbit = (e) => e & -e;
  const ones = (n) => n.toString(2).replaceAll("0", "").length;

  function* queryPath(n) {
    for (; n; n -= lowbit(n)) yield n;
  }

  /** What token t sees, nearest first. An entry is a bucket of closed chunks. The open chunk holds raw tokens. */
  function bucketsOf(t, C) {
    const chunk = Math.floor(t / C), first = chunk * C;
    const found = [{ level: 0, entry: null, start: t, stop: t + 1 }];
    for (const e of queryPath(t - first))
      found.push({ level: bitLength(lowbit(e)), entry: null, start: first + e - lowbit(e), stop: first + e });
    for (const e of queryPath(chunk))
      found.push({ level: bitLength(lowbit(e) * C), entry: e, start: (e - lowbit(e)) * C, stop: e * C });
    return found;
  }

  /** The counter after t tokens and `step` steps of the carry: the first step makes the leaf, each other one merges a slot. */
  function counterOf(t, C, step) {
    const chunk = Math.floor(t / C), entry = chunk + 1, last = bitLength(lowbit(entry)); // the step that ends the merging
    const slots = [];
    for (let m = 0; m < Math.max(bitLength(entry), 1); m++)
      slots.push((chunk >> m) & 1 && m >= step - 1 ? (chunk >> m) << m : null);
    return { chunk, entry, last, slots, open: step ? 0 : t % C, carried: step ? 2 ** (step - 1) : 0 };
  }

  // ---------------------------------------------------------------------------------------------------------- memory

  const WIDTH = { float32: 4, bfloat16: 2 };
  const MODELS = {
    mamba2: { rule: "scalar", H: 48, G: 1, K: 128, V: 64, heads: 16, width: 96 },
    deltanet: { rule: "delta", H: 6, G: 6, K: 192, V: 384, heads: 16, width: 96 },
  };

  /** Bytes of one layer and one sequence: a DecodingState and a KV cache with room for t tokens. */
  function bytesOf(t, C, { H, G, K, V, dtype, entries, rule, heads, width }) {
    const slots = Math.max(bitLength(Math.floor(t / C)), 1), delta = rule === "delta";
    const open = G * 2 * C * K * WIDTH[dtype] + H * C * V * WIDTH[dtype] + H * 2 * C * 4;
    const parts = {
      entries: H * slots * K * V * WIDTH[entries],
      decay: delta ? 0 : 2 * H * slots * 4,
      open: open + (delta ? H * 2 * C * C * 4 : 0),
      position: 8,
    };
    const state = Object.values(parts).reduce((sum, part) => sum + part);
    return { slots, ...parts, state, cache: 8 + 2 * t * heads * width * WIDTH[dtype] };
  }

  // ----------------------------------------------------------------------------------------------------------- words

  const number = (n) => n.toLocaleString("en");
  const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
  const span = (start, stop) => (stop - start === 1 ? number(start) : `${number(start)}–${number(stop - 1)}`);
  const chunks = (start, stop) => `${stop - start === 1 ? "chunk" : "chunks"} ${span(start, stop)}`;

  function human(bytes) {
    const unit = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), 3), value = bytes / 1024 ** unit;
    const digits = value >= 100 || unit === 0 ? number(Math.round(value)) : value.toPrecision(3);
    return `${digits} ${["B", "KiB", "MiB", "GiB"][unit]}`;
  }

  /** What is wrong with a number that the reader typed, or "". */
  function numberError(name, value, low, high) {
    if (Number.isInteger(value) && value >= low && value <= high) return "";
    return `${name} must be a whole number from ${number(low)} to ${number(high)}: got ${Number.isNaN(value) ? "none" : value}.`;
  }

  function sizeError(sizes) {
    const wrong = ["H", "G", "K", "V", "heads", "width"].map((name) => numberError(name, sizes[name], 1, 65536)).find(Boolean);
    const uneven = sizes.H % sizes.G ? `H must be a multiple of G: got H = ${sizes.H}, G = ${sizes.G}.` : "";
    return wrong ?? uneven;
  }

  /** What the counter has just done. */
  function caption(t, C, step) {
    const { chunk, entry, last } = counterOf(t, C, step);
    if (step > 1)
      return `Slot ${step - 2} was full. Its entry ${number(entry - 2 ** (step - 2))} is merged into entry ${number(entry)}, ` +
        `which now holds ${number(2 ** (step - 1))} chunks. Slot ${step - 1} is ${step < last ? "full too" : "empty"}.`;
    if (step)
      return `${t % C === C - 1 ? `Token ${number(t)} arrives` : `Tokens ${span(t, entry * C)} arrive`} and chunk ` +
        `${number(chunk)} is complete. It becomes entry ${number(entry)}, one state. ` +
        (last > 1 ? "Slot 0 is full: the counter carries." : "Slot 0 is empty.");
    const kept = t % C ? ` ${plural(t % C, "token")} of chunk ${number(chunk)} ${t % C === 1 ? "is" : "are"} kept raw.` : "";
    if (!chunk) return `No chunk is closed yet: every slot is empty.${kept}`;
    return `After ${plural(t, "token")}, ${plural(chunk, "chunk")} ${chunk === 1 ? "is" : "are"} closed: ${number(chunk)} is ` +
      `${chunk.toString(2)} in binary. The latest is part of entry ${number(chunk)} in slot ${bitLength(lowbit(chunk)) - 1}.${kept}`;
  }

  return {
    LARGEST, LEVELS, MODELS, bitLength, ones, bucketsOf, counterOf, bytesOf,
    number, plural, span, chunks, human, numberError, sizeError, caption,
  };
})();
