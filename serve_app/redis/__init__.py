"""Redis or Valkey: client and transactions, the embedded server, information about a server."""
