"""The wire types that both layers share: request, events, model card, errors and log context.

serve_app and deployments meet in four packages only: protocol (these types), validation (request and card to
resolved request), sandbox (decoding untrusted pictures) and lora_format (reading LoRA files). protocol
imports nothing of ours; it validates single fields, never a request against a card.
"""
