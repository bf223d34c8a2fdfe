"""Parts that every broadcache process uses: settings, logs, tokens, orderly closing."""
