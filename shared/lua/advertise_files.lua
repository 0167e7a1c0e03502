-- Say which parts of versions a server holds, and which it holds no more.
-- KEYS holders of each part (sorted sets: URL, until when it is surely there, ms): first of those it holds
-- ARGV[1] URL of the server   ARGV[2] how long it surely holds them, ms   ARGV[3] number of those it holds
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for k, key in ipairs(KEYS) do
  if k <= tonumber(ARGV[3]) then
    redis.call('ZADD', key, now + ARGV[2], ARGV[1])
    redis.call('PEXPIRE', key, ARGV[2])
  else
    redis.call('ZREM', key, ARGV[1])
  end
end
