// The page "Video": the same workspace, with the fields for videos.

import { asVideoModel, videoBody } from "../video-rules.js";
import { createWorkspace } from "../workspace.js";

export const mount = createWorkspace({
  kind: "video",
  modelFor: asVideoModel,
  body: videoBody,
  words: {
    title: "video.title",
    promptHint: "video.promptHint",
    promptEmpty: "video.promptEmpty",
    firstTitle: "video.firstTitle",
    samples: ["video.sample1", "video.sample2", "video.sample3"],
    noModels: "video.noModels",
  },
});
