"""The JSON of the API: request bodies, responses, problems, and the OpenAPI document."""
