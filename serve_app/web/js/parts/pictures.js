// Showing and saving finished files. An <img> cannot send a key, so with one they are fetched as blobs.

import { h } from "../dom.js";

const KEPT = 120; // blob addresses; the oldest are given back

/**
 * @param {import("../types.js").Api} api
 * @param {() => boolean} needsKey
 */
export function createPictures(api, needsKey) {
  /** @type {Map<string, Promise<string>>} */
  const addresses = new Map();

  /** @param {string} url */
  function blobAddress(url) {
    let address = addresses.get(url);
    if (address === undefined) {
      address = api.blob(url).then((blob) => URL.createObjectURL(blob));
      addresses.set(url, address);
      address.catch(() => addresses.delete(url));
      const [oldest] = addresses.keys();
      if (addresses.size > KEPT && oldest !== undefined) {
        void addresses.get(oldest)?.then((old) => URL.revokeObjectURL(old));
        addresses.delete(oldest);
      }
    }
    return address;
  }

  return {
    /**
     * @param {string} url
     * @param {import("../dom.js").Attributes} attributes
     * @param {() => void} onGone  the file cannot be had
     */
    image(url, attributes, onGone) {
      const image = h("img", { decoding: "async", ...attributes, on: { error: onGone } });
      if (needsKey()) {
        blobAddress(url).then((address) => void (image.src = address), onGone);
      } else {
        image.src = api.address(url);
      }
      return image;
    },

    /**
     * A player that shows the first frame until it is played.
     *
     * @param {string} url
     * @param {string | null} posterUrl
     * @param {import("../dom.js").Attributes} attributes
     * @param {() => void} onGone  the file cannot be had
     */
    video(url, posterUrl, attributes, onGone) {
      const video = h("video", {
        ...attributes,
        controls: true,
        loop: true,
        playsinline: true,
        preload: "metadata",
        on: { error: onGone },
      });
      if (needsKey()) {
        blobAddress(url).then((address) => void (video.src = address), onGone);
        if (posterUrl !== null) {
          const poster = blobAddress(posterUrl);
          poster.then((address) => void (video.poster = address)).catch(() => undefined); // plays without
        }
      } else {
        if (posterUrl !== null) video.poster = api.address(posterUrl);
        video.src = api.address(url);
      }
      return video;
    },

    /**
     * Gives the file to the browser's downloads.
     * @param {string} url
     * @param {string} name
     */
    async save(url, name) {
      const address = URL.createObjectURL(await api.blob(url));
      const link = h("a", { href: address, download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser reads it after the click
    },
  };
}

/** @param {import("../types.js").Picture} file */
export function isVideo(file) {
  return file.mediaType.startsWith("video/");
}

/**
 * The name of a saved picture or video; holds the job's id.
 *
 * @param {string} jobId
 * @param {import("../types.js").Picture} picture
 */
export function fileName(jobId, picture) {
  const ending = picture.mediaType === "image/jpeg" ? "jpg" : (picture.mediaType.split("/")[1] ?? "png");
  return `weft-${jobId}-${picture.index}.${ending}`;
}
