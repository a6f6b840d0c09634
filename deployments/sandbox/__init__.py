"""Decoding of untrusted pictures in child processes with limits on memory, time and open files.

Used by both layers: serve_app when it accepts pictures, deployments before a picture reaches a pipeline.
"""
