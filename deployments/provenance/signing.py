"""Signing: a manifest is written into finished files, after everything else."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module

from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.events import Artifact
from deployments.protocol.request import ResolvedRequest
from deployments.protocol.signing_identity import SigningIdentity
from deployments.provenance.library import C2PA, C2paContext, C2paSigner, load_library
from deployments.provenance.manifest import definition, given_pictures, picture_type
from deployments.provenance.verifying import verify

SIGNED_TYPES = frozenset({"image/png", "image/jpeg", "image/webp", "video/mp4"})
_ONE_PIXEL = base64.b64decode(  # a PNG file
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)

logger = logging.getLogger(__name__)


class ManifestSigner:
    """Signs the files of one process, one at a time, in a thread of its own."""

    def __init__(self, identity: SigningIdentity) -> None:
        """Raises ModelUnavailable when the library, the certificates or the key cannot be used."""
        self._identity = identity
        self._library = load_library()
        self._context = signing_context(self._library)
        try:
            self._signer = _signer(self._library, identity)
            self._try_out()
        except (self._library.C2paError, ImportError, AttributeError, ValueError, TypeError) as error:
            raise ModelUnavailable(
                "files cannot be signed with the certificates and the key of the settings WEFT_SIGNING_... "
                f"({error}); correct them, or set WEFT_CONTENT_CREDENTIALS=false"
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sign")

    def skips(self, user: str) -> bool:
        """Whether the operator has switched signing off for this user."""
        return user in self._identity.unsigned_users

    async def sign(self, artifact: Artifact, request: ResolvedRequest) -> Artifact:
        """The file with its manifest. Raises Internal when it cannot be signed: no file leaves unsigned by
        an error. A media type outside of SIGNED_TYPES is returned as it is.
        """
        if artifact.media_type not in SIGNED_TYPES:
            return artifact
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._signed, artifact, request)

    def _signed(self, artifact: Artifact, request: ResolvedRequest) -> Artifact:
        manifest = definition(artifact, request, with_prompt=self._identity.with_prompt)
        target = io.BytesIO()
        try:
            with self._library.Builder(manifest, context=self._context) as builder:
                self._add_ingredients(builder, request)
                builder.sign(self._signer, artifact.media_type, io.BytesIO(artifact.data), target)
        except self._library.C2paError as error:
            raise Internal(f"the {artifact.kind} could not be signed: {error}") from error
        return replace(artifact, data=target.getvalue())

    def _try_out(self) -> None:
        """Sign a picture of one pixel. Raises C2paError, and ValueError for a key of another certificate."""
        target = io.BytesIO()
        with self._library.Builder({"title": "trial"}, context=self._context) as builder:
            builder.set_intent(
                self._library.C2paBuilderIntent.CREATE,
                self._library.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA,
            )
            builder.sign(self._signer, "image/png", io.BytesIO(_ONE_PIXEL), target)
        found = verify(target.getvalue(), "image/png")
        if found.state == "invalid":
            raise ValueError(f"a trial was not valid: {', '.join(found.failures)}")

    def _add_ingredients(self, builder: C2PA, request: ResolvedRequest) -> None:
        """State the given pictures, each with the manifest that it carries."""
        for title, data in given_pictures(request):
            media_type = picture_type(data)
            if media_type is None:
                continue
            ingredient = {"title": title, "format": media_type, "relationship": "inputTo"}
            try:
                builder.add_ingredient(ingredient, media_type, io.BytesIO(data))
            except self._library.C2paError as error:
                # the model could use the picture, so the request does not fail for what is beside the pixels
                logger.warning("the manifest of a given picture cannot be read", extra={"error": str(error)})


def signing_context(library: C2PA) -> C2paContext:
    """Settings for signing: nothing is fetched, and no thumbnails of results or inputs are embedded."""
    settings = {
        "builder": {"thumbnail": {"enabled": False}},
        # a given picture may name any address as the place of its manifest
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    }
    return library.Context(library.Settings.from_dict(settings))


def _signer(library: C2PA, identity: SigningIdentity) -> C2paSigner:
    timestamps = identity.timestamp_url or None
    if identity.function:
        algorithm = library.C2paSigningAlg[identity.algorithm.upper()]
        return library.Signer.from_callback(
            _function(identity.function), algorithm, identity.certificates, timestamps
        )
    if identity.key is None:
        raise ValueError("there is neither a key nor a function that signs")
    key = identity.key.get_secret_value().encode()
    info = library.C2paSignerInfo(identity.algorithm, identity.certificates.encode(), key, timestamps)
    return library.Signer.from_info(info)


def _function(path: str) -> Callable[[bytes], bytes]:
    """The operator's function at `module:function`. Raises ImportError and AttributeError."""
    module, _, name = path.partition(":")
    function: Callable[[bytes], bytes] = getattr(import_module(module), name)
    return function
