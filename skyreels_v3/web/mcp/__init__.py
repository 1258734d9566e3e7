"""MCP, the Model Context Protocol: the server's tools and videos for agents."""
