// Which page is shown: the part of the address after "#/". A new page is one more line in PAGES.

/**
 * @typedef {object} Page
 * @property {import("./types.js").TextKey} label
 * @property {string} icon
 * @property {import("./types.js").Kind} kind  what is made there
 * @property {() => Promise<{ mount: Mount }>} load
 */

/**
 * Fills `root`; gives back what to call before the page is left.
 * @callback Mount
 * @param {HTMLElement} root
 * @param {import("./app.js").Services} services
 * @returns {() => void}
 */

/** @type {Readonly<Record<string, Page>>} */
export const PAGES = {
  create: { label: "nav.create", icon: "sparkle", kind: "image", load: () => import("./pages/create.js") },
  video: { label: "nav.video", icon: "film", kind: "video", load: () => import("./pages/video.js") },
};

/**
 * The name of the page an address asks for.
 *
 * @param {string} hash
 */
export function pageName(hash) {
  const name = hash.replace(/^#\/?/, "").split("/")[0] ?? "";
  return Object.hasOwn(PAGES, name) ? name : "create";
}

/**
 * Shows the page of the address, now and whenever it changes.
 *
 * @param {HTMLElement} root
 * @param {import("./app.js").Services} services
 * @param {(name: string) => void} onPage
 */
export function route(root, services, onPage) {
  let leave = () => {};
  let shown = "";
  const show = async () => {
    const name = pageName(location.hash);
    const page = PAGES[name];
    if (name === shown || page === undefined) return;
    shown = name;
    leave();
    leave = (await page.load()).mount(root, services);
    onPage(name);
  };
  window.addEventListener("hashchange", () => void show());
  return show();
}
