"""Redis or Valkey: transactions, the embedded server, what a server says about itself."""
