"""Pictures and videos as files: decoding inputs, encoding results, control maps."""
