"""`speeder serve`: a recommender behind HTTP, and one page in the browser to try it.

`app.create_app` makes the FastAPI application of a loaded model; `server.serve` runs it until it is stopped.
Needs the extra `speeder[serve]`.
"""
