"""What every process of broadcache needs: settings, logs, tokens, and closing in order."""
