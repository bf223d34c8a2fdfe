"""One publish: logged, retried, confirmed, with a second path over HTTP."""
