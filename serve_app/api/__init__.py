"""The HTTP faces: each dialect translates its wire shape into one GenerationRequest and a job back."""
