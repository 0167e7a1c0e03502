-- Set the head to one that was announced before and wake the followers, where Redis lost it: it never lowers the head.
-- KEYS[1] head (hash)   KEYS[2] events (stream)
-- ARGV[1] version   ARGV[2...] the head's fields, name and value in turn
-- Returns 1 when restored, 0 when the head is as high or higher.
local head = redis.call('HGET', KEYS[1], 'version')
if head and tonumber(head) >= tonumber(ARGV[1]) then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'version', ARGV[1])
return 1
