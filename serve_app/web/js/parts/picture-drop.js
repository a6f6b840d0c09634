// A drop target for pictures that also opens a file dialog.

import { h, icon } from "../dom.js";
import { PICTURE_TYPES } from "../form-rules.js";

/**
 * @param {{ id: string, words: string, multiple: boolean, onFiles: (files: File[]) => void }} options
 */
export function createPictureDrop({ id, words, multiple, onFiles }) {
  const input = h("input", {
    id,
    type: "file",
    class: "visually-hidden",
    accept: PICTURE_TYPES.join(","),
    multiple,
    on: {
      change() {
        onFiles([...(input.files ?? [])]);
        input.value = ""; // the same file may be chosen again
      },
    },
  });
  const drop = h(
    "label",
    {
      class: "drop",
      for: id,
      on: {
        dragover(event) {
          event.preventDefault();
          drop.classList.add("over");
        },
        dragleave: () => drop.classList.remove("over"),
        drop(event) {
          event.preventDefault();
          drop.classList.remove("over");
          onFiles([...(event.dataTransfer?.files ?? [])]);
        },
      },
    },
    icon("picture"),
    h("span", {}, words),
  );
  return { input, drop };
}

/**
 * The file as a data: address.
 *
 * @param {File} file
 * @returns {Promise<string>}
 */
export function dataAddress(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(String(reader.result)));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
