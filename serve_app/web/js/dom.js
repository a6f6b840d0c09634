// Building elements. Text goes in as text nodes, styles through CSSOM: nothing here can inject markup.

/**
 * @typedef {{ [E in keyof HTMLElementEventMap]?: (event: HTMLElementEventMap[E]) => void }} Listeners
 * @typedef {string | number | boolean | null | undefined} Value  true: empty attribute; false, null, undefined: none
 * @typedef {{ [aria: `aria-${string}`]: Value, [data: `data-${string}`]: Value,
 *   class?: string, id?: string, type?: string, name?: string, value?: Value, min?: Value, max?: Value,
 *   step?: Value, for?: string, role?: string, title?: Value, alt?: string, src?: string, href?: string,
 *   rel?: string, target?: string, tabindex?: number, rows?: number, placeholder?: string, disabled?: boolean,
 *   checked?: boolean, selected?: boolean, hidden?: boolean, open?: boolean, required?: boolean,
 *   autocomplete?: string, autocapitalize?: string, spellcheck?: "true" | "false", inputmode?: string,
 *   maxlength?: number, accept?: string, multiple?: boolean, download?: string, width?: number, height?: number, loading?: "lazy" | "eager",
 *   controls?: boolean, loop?: boolean, playsinline?: boolean, preload?: "none" | "metadata" | "auto",
 *   decoding?: "async" | "sync", novalidate?: boolean, on?: Listeners }} Attributes
 * @typedef {Node | string | null | undefined | false} Child
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * The address of a file of the page, in the version that this module has.
 *
 * @param {string} path  in the folder of the page
 */
export function asset(path) {
  return new URL(`../${path}`, import.meta.url).href;
}

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  const { on, ...plain } = attributes;
  for (const [name, value] of Object.entries(plain)) {
    if (value === false || value === null || value === undefined) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const [type, listener] of Object.entries(on ?? {})) {
    element.addEventListener(type, /** @type {EventListener} */ (listener));
  }
  element.append(...present(children));
  return element;
}

/** Brings icons/sprite.svg into the page: a <use> that points into a file is fetched anew at every icon. */
export async function loadIcons() {
  const response = await fetch(asset("icons/sprite.svg"));
  const parsed = new DOMParser().parseFromString(await response.text(), "image/svg+xml");
  const sprite = document.importNode(parsed.documentElement, true);
  sprite.setAttribute("class", "visually-hidden");
  sprite.setAttribute("aria-hidden", "true");
  return sprite;
}

/**
 * An icon of the sprite; decoration only, the words stand beside it.
 *
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * @param {Element} element
 * @param {...Child} children
 */
export function fill(element, ...children) {
  element.replaceChildren(...present(children));
}

/**
 * Writes text only when it differs, so that live regions stay quiet.
 *
 * @param {Element} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * @param {HTMLElement} element
 * @param {`--${string}`} name
 * @param {string | number} value
 */
export function setVar(element, name, value) {
  element.style.setProperty(name, String(value));
}

/**
 * @param {Child[]} children
 * @returns {(Node | string)[]}
 */
function present(children) {
  return /** @type {(Node | string)[]} */ (
    children.filter((child) => child !== null && child !== undefined && child !== false)
  );
}
