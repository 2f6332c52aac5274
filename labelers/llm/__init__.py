"""Language models that measure: scorers and chats, in this process, in engines of their own, or on servers."""
