// The service's HTTP API. Addresses are relative to the page, so any prefix in front of it works.

import * as wire from "./wire.js";

/** A refusal of the API, or code "network" when there was no answer at all. */
export class ApiError extends Error {
  /**
   * @param {number} status  0 without an answer
   * @param {import("./types.js").Problem} problem
   */
  constructor(status, problem) {
    super(problem.message);
    this.status = status;
    this.problem = problem;
  }

  /** The same call may succeed a little later. */
  get transient() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

/**
 * @typedef {object} Access
 * @property {URL} base                           address of .../api/
 * @property {() => string | null} key            the key to send, if any
 * @property {() => Promise<boolean>} askForKey   called on 401; true: a key was given, try again
 * @property {(on: boolean) => void} signedIn     a cookie speaks for this browser from now on, or no more
 */

/**
 * @param {Access} access
 * @returns {import("./types.js").Api}
 */
export function createApi({ base, key, askForKey, signedIn }) {
  let logIns = 0;
  /**
   * @param {URL} url
   * @param {RequestInit} [init]
   * @returns {Promise<Response>}
   */
  async function send(url, init = {}) {
    const used = key();
    const logInsBefore = logIns;
    const headers = new Headers(init.headers);
    if (url.origin === base.origin) {
      headers.set("X-Weft-CSRF", "1"); // the session's cookie alone changes nothing
      if (used !== null) headers.set("Authorization", `Bearer ${used}`);
    }
    let response;
    try {
      response = await fetch(url, { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError(0, { code: "network", message: "", param: null, retryAfterS: null });
    }
    if (response.ok) return response;
    const refusal = new ApiError(response.status, await problemOf(response));
    if (response.status !== 401) throw refusal;
    const changed = key() !== used || logIns !== logInsBefore; // another call got the key meanwhile
    if (!changed && !(await askForKey())) throw refusal;
    await logIn();
    return send(url, init);
  }

  /** Trades the key for a cookie that no script can read; where there is none to be had, the key stays. */
  async function logIn() {
    const given = key();
    if (given === null) return;
    const response = await fetch(new URL("../auth/session", base), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ api_key: given }),
    }).catch(() => null);
    if (!response?.ok) return;
    logIns += 1;
    signedIn(true);
  }

  /** @param {string} path */
  const at = (path) => new URL(path, base);
  /** @param {string} path */
  const read = async (path) => wire.parse(await (await send(at(path))).text());

  return {
    async models() {
      return (await read("models/")).models.map(wire.model);
    },
    async loras() {
      return (await read("loras")).loras.map(wire.lora);
    },
    async addLora(file) {
      const body = new FormData();
      body.append("file", file);
      return wire.lora(wire.parse(await (await send(at("loras"), { method: "POST", body })).text()));
    },
    async generate(body, kind, idempotencyKey) {
      const response = await send(at(`generate/${kind}`), {
        method: "POST",
        headers: { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey },
        body: wire.stringify(body),
      });
      const json = wire.parse(await response.text());
      return { id: json.id, status: json.status, warnings: json.warnings ?? [] };
    },
    async job(id) {
      return wire.job(await read(`generate/${encodeURIComponent(id)}`));
    },
    async jobs(limit, kind) {
      const only = kind === undefined ? "" : `&kind=${kind}`;
      return wire.jobs(await read(`generate/?limit=${limit}${only}`));
    },
    async cancel(id) {
      await send(at(`generate/${encodeURIComponent(id)}`), { method: "DELETE" });
    },
    events(id, lastId, signal) {
      const headers = {
        Accept: "text/event-stream",
        ...(lastId === null ? {} : { "Last-Event-ID": lastId }),
      };
      return send(at(`generate/${encodeURIComponent(id)}/events`), { headers, signal, cache: "no-store" });
    },
    async logOut() {
      signedIn(false);
      await send(at("../auth/session"), { method: "DELETE" });
    },
    address: (url) => at(url).href,
    async blob(url) {
      return (await send(at(url))).blob();
    },
  };
}

/**
 * @param {Response} response
 * @returns {Promise<import("./types.js").Problem>}
 */
async function problemOf(response) {
  const after = Number(response.headers.get("Retry-After") ?? NaN);
  const retryAfterS = Number.isFinite(after) ? after : null;
  try {
    const { error } = wire.parse(await response.text());
    return wire.problem(error, retryAfterS);
  } catch {
    // not our JSON: a proxy in between answered
    const code = response.status >= 500 ? "overloaded" : "bad_request";
    return {
      code,
      message: `HTTP ${response.status} ${response.statusText}`.trim(),
      param: null,
      retryAfterS,
    };
  }
}
