// What this browser remembers. localStorage for taste, sessionStorage for the key and the draft.

import { signal } from "./signal.js";

/** @typedef {"system" | "light" | "dark"} Theme */

const THEMES = /** @type {const} */ (["system", "light", "dark"]);

export const theme = signal(storedTheme());
theme.subscribe((chosen) => {
  if (chosen === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("weft.theme");
  } else {
    document.documentElement.dataset.theme = chosen;
    localStorage.setItem("weft.theme", chosen);
  }
});

/** @returns {Theme} */
function storedTheme() {
  const stored = localStorage.getItem("weft.theme");
  return THEMES.find((known) => known === stored) ?? "system";
}

export function nextTheme() {
  theme.set(THEMES[(THEMES.indexOf(theme.get()) + 1) % THEMES.length] ?? "system");
}

export const singleKeys = signal(localStorage.getItem("weft.single-keys") !== "off");
singleKeys.subscribe((on) => localStorage.setItem("weft.single-keys", on ? "on" : "off"));

export const key = signal(sessionStorage.getItem("weft.key"));
key.subscribe((value) => {
  if (value === null) sessionStorage.removeItem("weft.key");
  else sessionStorage.setItem("weft.key", value);
});

/** Whether a cookie speaks for this browser; scripts cannot see the cookie itself. */
export const session = signal(localStorage.getItem("weft.session") === "on");
session.subscribe((on) => {
  if (on) localStorage.setItem("weft.session", "on");
  else localStorage.removeItem("weft.session");
});

/** Where the draft of a page's form is kept. @param {import("./types.js").Kind} kind */
const draftName = (kind) => (kind === "image" ? "weft.draft" : `weft.draft.${kind}`);

/**
 * @param {import("./types.js").Kind} kind
 * @returns {Partial<import("./types.js").FormValues>}
 */
export function readDraft(kind) {
  try {
    return JSON.parse(sessionStorage.getItem(draftName(kind)) ?? "{}");
  } catch {
    return {}; // written by another version of the page
  }
}

/**
 * Without its pictures: they are larger than a browser keeps.
 *
 * @param {import("./types.js").FormValues} form
 * @param {import("./types.js").Kind} kind
 */
export function keepDraft(form, kind) {
  const video = form.video && { ...form.video, image: null };
  sessionStorage.setItem(draftName(kind), JSON.stringify({ ...form, controls: [], video }));
}
