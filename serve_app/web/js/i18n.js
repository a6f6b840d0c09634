// Words by key. A new language is one more file under locales/ and one more line in LANGUAGES.

import { asset } from "./dom.js";

/** @typedef {import("./types.js").TextKey} TextKey */
/** @typedef {import("./types.js").TextParams} TextParams */
/** @typedef {string | Partial<Record<Intl.LDMLPluralRule, string>>} Entry */

/** @type {Readonly<Record<string, string>>} */
export const LANGUAGES = { en: "English" };

let language = "en";
/** @type {Record<string, Entry>} */
let texts = {};
let plural = new Intl.PluralRules(language);

/**
 * @param {string} chosen
 * @param {Record<string, Entry>} entries
 */
export function useTexts(chosen, entries) {
  language = chosen;
  texts = entries;
  plural = new Intl.PluralRules(chosen);
}

/** The first language of the person that we speak. */
export function preferredLanguage(/** @type {readonly string[]} */ wanted) {
  const codes = wanted.map((tag) => tag.split("-")[0] ?? "");
  return codes.find((code) => code in LANGUAGES) ?? "en";
}

/** Loads a language's words and marks the page with it. */
export async function loadLanguage(/** @type {string} */ chosen) {
  const response = await fetch(asset(`locales/${chosen}.json`));
  useTexts(chosen, /** @type {Record<string, Entry>} */ (await response.json()));
  document.documentElement.lang = chosen;
}

/**
 * The words of a key. An entry with plural forms picks by `params.count`.
 *
 * @param {TextKey} key
 * @param {TextParams} [params]
 * @returns {string}
 */
export function t(key, params = {}) {
  const entry = texts[key];
  if (entry === undefined) throw new Error(`no text for ${key}`);
  const form =
    typeof entry === "string" ? entry : (entry[plural.select(Number(params.count))] ?? entry.other ?? "");
  return form.replace(/\{(\w+)\}/g, (_, name) => {
    const value = params[name];
    if (value === undefined) throw new Error(`text ${key} needs {${name}}`);
    return typeof value === "number" ? formatNumber(value) : value;
  });
}

/** @param {import("./types.js").Text} text */
export function translate(text) {
  return t(text.key, text.params);
}

/**
 * @param {number} value
 * @param {Intl.NumberFormatOptions} [options]
 */
export function formatNumber(value, options = {}) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: 2, useGrouping: false, ...options }).format(
    value,
  );
}

/** Unix seconds as day and time. */
export function formatTime(/** @type {number} */ unixSeconds) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(
    unixSeconds * 1000,
  );
}
