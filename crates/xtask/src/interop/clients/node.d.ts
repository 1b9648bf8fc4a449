// What client.ts uses of node.
declare const process: { argv: string[] };
