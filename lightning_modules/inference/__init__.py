"""Use a trained model: load it, ask about videos, narrate, chat, export."""
