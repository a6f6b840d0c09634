// Keyboard shortcuts. Single-character ones can be switched off (WCAG 2.1.4).

/**
 * @typedef {object} Shortcut
 * @property {string} key          KeyboardEvent.key
 * @property {boolean} [command]   with Ctrl (or Cmd)
 * @property {() => boolean} run   false: not handled now; the browser handles it
 */

/**
 * The shortcut an event stands for.
 *
 * @param {Pick<KeyboardEvent, "key" | "ctrlKey" | "metaKey" | "altKey">} event
 * @param {Shortcut[]} shortcuts
 * @param {{ typing: boolean, single: boolean }} state  typing in a field; single keys allowed
 */
export function matching(event, shortcuts, { typing, single }) {
  if (event.altKey) return undefined;
  const command = event.ctrlKey || event.metaKey;
  return shortcuts.find((shortcut) => {
    if (shortcut.key.toLowerCase() !== event.key.toLowerCase()) return false;
    if (Boolean(shortcut.command) !== command) return false;
    const isCharacter = !command && shortcut.key.length === 1;
    return !isCharacter || (single && !typing);
  });
}

/**
 * Listens until the signal aborts. An open dialog keeps the keys to itself.
 *
 * @param {Shortcut[]} shortcuts
 * @param {() => boolean} singleKeys
 * @param {AbortSignal} signal
 */
export function listen(shortcuts, singleKeys, signal) {
  document.addEventListener(
    "keydown",
    (event) => {
      if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
      const target = /** @type {Element | null} */ (event.target);
      const typing = target?.matches?.("input, textarea, select") ?? false;
      const shortcut = matching(event, shortcuts, { typing, single: singleKeys() });
      // a key held down is one press, and still none of the browser's
      if (shortcut !== undefined && (event.repeat || shortcut.run())) event.preventDefault();
    },
    { signal },
  );
}
