"""Names that look unused to vulture and are not: `make lint` reads them."""

# ruff: noqa

# Fields of answers and settings that only their readers use
_.access_token
_.attribution
_.commercial
_.expires_in
_.first_id
_.gated
_.has_more
_.image_tokens
_.input_tokens
_.input_tokens_details
_.int_id
_.last_id
_.model_cache
_.moderation
_.output_tokens
_.owned_by
_.partial_image_index
_.plain_pictures
_.poster_url
_.preview_url
_.remixed_from_video_id
_.safety_identifier
_.spritesheet_url
_.thumbnail_url
_.token_type
_.total_tokens
_.trace_dir

# Called by Ray Serve, FastAPI, Typer or pydantic
_.asset
_.build_gateway
_.build_model
_.build_weights
_.check_health
_.exporters
_.format_commands
_.issue_token
_.list_commands
_.lora_pool
_.open_link
_.open_session
_.record_autoscaling_stats
_.settings_customise_sources

# Parameters that an interface of a library prescribes
_.closure
_.controlnet_mode
_.dotenv_settings
_.file_secret_settings
_.local_address
_.socket_options

# Attributes of objects of libraries, which read them
_.__cause__
_.__traceback__
_.__wrapped__
_.act_mlp
_.color_primaries
_.color_range
_.color_trc
_.colorspace
_.dts
_.duration
_.gr_context
_.pix_fmt
_.recompile_limit
_.thread_count

# Kept for their effect: the import of a decoder; the processes that a test kills
_.DECODERS
_.pids
