// Swagger UI over this server's own description, with nothing from elsewhere.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", validatorUrl: null, tryItOutEnabled: true });
