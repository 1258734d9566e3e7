"""MCP, the Model Context Protocol: the server's videos, for agents."""
