// The page "Create": pictures.

import { asPictureModel, requestBody } from "../form-rules.js";
import { createWorkspace } from "../workspace.js";

export const mount = createWorkspace({
  kind: "image",
  modelFor: asPictureModel,
  body: requestBody,
  words: {
    title: "create.title",
    promptHint: "prompt.hint",
    promptEmpty: "prompt.empty",
    firstTitle: "first.title",
    samples: ["first.sample1", "first.sample2", "first.sample3"],
    noModels: "noModels.text",
  },
});
