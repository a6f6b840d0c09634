// Reading server-sent events from a fetch answer, as the HTML standard cuts them.

/** @typedef {import("./types.js").SseEvent} SseEvent */

/** Takes the stream in pieces of any size and gives back the events they complete. */
export class EventParser {
  #rest = "";
  #afterCr = false; // the last piece ended in CR; an LF that follows belongs to it
  #type = "";
  /** @type {string[]} */
  #data = [];
  #id = "";

  /**
   * @param {string} text
   * @returns {SseEvent[]}
   */
  push(text) {
    if (this.#afterCr && text.startsWith("\n")) text = text.slice(1);
    if (text !== "") this.#afterCr = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop() ?? "";
    /** @type {SseEvent[]} */
    const events = [];
    for (const line of lines) this.#line(line, events);
    return events;
  }

  /**
   * @param {string} line
   * @param {SseEvent[]} events
   */
  #line(line, events) {
    if (line === "") {
      if (this.#data.length > 0) {
        events.push({ id: this.#id, type: this.#type || "message", data: this.#data.join("\n") });
      }
      this.#type = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#type = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = value;
  }
}

/**
 * The events of an open stream, until it ends. `onBytes` is called for every piece, keep-alive
 * comments included, so that a caller can distinguish a quiet stream from a dead one.
 *
 * @param {Response} response
 * @param {() => void} [onBytes]
 * @returns {AsyncGenerator<SseEvent>}
 */
export async function* readEvents(response, onBytes) {
  if (response.body === null) return;
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes?.();
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    await reader.cancel().catch(() => undefined); // the connection may be gone already
  }
}
