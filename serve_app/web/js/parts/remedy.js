// The suggested fix for each error. Pure.

import { smaller } from "../form-rules.js";

/**
 * @typedef {{ kind: "again" } | { kind: "wait", seconds: number } | { kind: "key" } | { kind: "none" }
 *   | { kind: "smaller", width: number, height: number } | { kind: "field", param: string }} Remedy
 */

/** @type {Readonly<Record<string, import("../types.js").TextKey>>} */
const TITLES = {
  bad_request: "error.bad_request",
  too_large: "error.too_large",
  unauthorized: "error.unauthorized",
  forbidden: "error.forbidden",
  not_found: "error.not_found",
  conflict: "error.conflict",
  quota_exceeded: "error.quota_exceeded",
  rate_limited: "error.rate_limited",
  overloaded: "error.overloaded",
  model_unavailable: "error.model_unavailable",
  model_failed: "error.model_unavailable",
  out_of_memory: "error.out_of_memory",
  network: "error.network",
};

/**
 * The words for an error's code; one we do not know is an internal one.
 *
 * @param {string} code
 * @returns {import("../types.js").TextKey}
 */
export function titleOf(code) {
  return TITLES[code] ?? "error.internal";
}

/**
 * @param {import("../types.js").Problem} problem
 * @param {{ width: number, height: number } | null} size  what was asked for, where that is known
 * @param {import("../types.js").Sizes | null} sizes        of its model
 * @param {(param: string | null) => boolean} hasField     whether the form has a control for a field
 * @returns {Remedy}
 */
export function remedy(problem, size, sizes, hasField) {
  switch (problem.code) {
    case "out_of_memory": {
      const less = size && sizes && smaller(size.width, size.height, sizes);
      return less ? { kind: "smaller", ...less } : { kind: "none" };
    }
    case "unauthorized":
      return { kind: "key" };
    case "rate_limited":
    case "overloaded":
    case "model_unavailable":
      return problem.retryAfterS
        ? { kind: "wait", seconds: Math.ceil(problem.retryAfterS) }
        : { kind: "again" };
    case "bad_request":
    case "too_large":
    case "not_found":
      return problem.param !== null && hasField(problem.param)
        ? { kind: "field", param: problem.param }
        : { kind: "none" };
    case "forbidden":
    case "quota_exceeded":
    case "model_failed":
      return { kind: "none" };
    default:
      return { kind: "again" };
  }
}
